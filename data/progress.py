"""Durations in words, for the time that is left."""


def duration(seconds: float) -> str:
    """Such as "3 d 4 h", "2 h 12 min", "41 s": the two largest units; below 0 as 0."""
    days, rest = divmod(round(max(seconds, 0.0)), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
