"""What can be known of images in contexts before an adapter is trained on them. Each module looks for one thing."""

from .findings import Finding, Problem, Remark, percent
from .report import DataReport, check_data


__all__ = ["DataReport", "Finding", "Problem", "Remark", "check_data", "percent"]
