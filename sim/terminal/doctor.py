"""`untether doctor`."""


def doctor() -> None:
    pass
