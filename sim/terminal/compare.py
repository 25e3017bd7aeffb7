"""`untether compare`."""


def compare() -> None:
    pass
