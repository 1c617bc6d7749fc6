"""The one place that holds the version; read by the build and by the package, without torch."""

__version__ = "0.1.0"
