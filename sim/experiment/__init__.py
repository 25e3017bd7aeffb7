"""An experiment: what is run, in typed sections."""

from untether.sim.experiment.experiment import Experiment, fields, key_values, parse_plain, parse_value

__all__ = ["Experiment", "fields", "key_values", "parse_plain", "parse_value"]
