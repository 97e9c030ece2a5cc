"""The pins of `launch/requirements.txt`."""

from packaging.requirements import Requirement

from conftest import ROOT

PINS = ROOT / "launch" / "requirements.txt"


def read_pins():
    lines = (line.partition("#")[0].strip() for line in PINS.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def applies_here(pin, extra):
    return pin.marker is None or pin.marker.evaluate({"extra": extra})


def pin_of(name):
    (found,) = (p for p in read_pins() if p.name == name and applies_here(p, ""))
    return f"{found.name}{found.specifier}"
