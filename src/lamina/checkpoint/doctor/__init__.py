"""The doctor: everything that can be told of an adapter directory, with a cure for each finding.

A broken directory leads to findings, never to a stop at the first thing that is wrong.
"""

from lamina.checkpoint.doctor.examine import examine
from lamina.checkpoint.doctor.findings import SEVERITIES, Examination, Finding, Severity

__all__ = ["SEVERITIES", "Examination", "Finding", "Severity", "examine"]
