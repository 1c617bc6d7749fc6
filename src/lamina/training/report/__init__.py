"""What a run came to, as a page, pictures and a model card; needs no torch."""

from lamina.training.report.writing import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
