"""How a configuration refuses a value: one ValueError that names setting, value and way out."""


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    check(value in choices, f"{setting} = {value!r}: choose one of {', '.join(choices)}")


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)
