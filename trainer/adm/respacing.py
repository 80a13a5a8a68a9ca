"""Which timesteps sampling visits, where it does not visit all of them. No torch here."""

from itertools import accumulate, repeat


def kept_timesteps(steps: int, respacing: str | None) -> list[int]:
    """The timesteps out of range(steps) that respaced sampling visits, ascending.

    `respacing` is None for all; "250" for so many, evenly spaced; "90,60,60,20,20" for so many
    in each of equal sections; "ddim25" for so many with one integer stride, from timestep 0.

    Raises:
        ValueError: the text is none of these, or cannot be met with `steps` timesteps.
    """
    if respacing is None:
        return list(range(steps))
    ddim = respacing.startswith("ddim")
    try:
        counts = [int(part) for part in respacing.removeprefix("ddim").split(",")]
    except ValueError:
        raise _refusal(respacing, 'such as "250", "90,60,60,20,20" or "ddim25"') from None
    if min(counts) < 1 or sum(counts) < 2:
        raise _refusal(respacing, "counts of at least 1 whose sum is at least 2")
    if not ddim:
        return _by_sections(steps, counts, respacing)
    if len(counts) > 1:
        raise _refusal(respacing, '"ddim" and one number')
    return _by_stride(steps, counts[0], respacing)


def _by_stride(steps: int, count: int, respacing: str) -> list[int]:
    possible = [len(range(0, steps, stride)) for stride in range(1, steps)]
    if count in possible:
        return list(range(0, steps, 1 + possible.index(count)))
    near = min(possible, key=lambda other: abs(other - count))
    expected = f"a count that an integer stride over {steps} timesteps gives, such as ddim{near}"
    raise _refusal(respacing, expected)


def _by_sections(steps: int, counts: list[int], respacing: str) -> list[int]:
    kept, start = [], 0
    size, longer = divmod(steps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise _refusal(respacing, f"at most {length} for a section of {length} timesteps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Summed as in guided-diffusion: a product rounds to another timestep for some counts.
        places = accumulate(repeat(stride, count - 1), initial=0.0)
        kept += [start + round(place) for place in places]
        start += length
    return kept


def _refusal(respacing: str, expected: str) -> ValueError:
    return ValueError(f"respacing = {respacing!r}: must be {expected}")
