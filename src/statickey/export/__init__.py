"""Trained networks in files for other programs."""

from .main import Artefact, Format, export_run

__all__ = ["Artefact", "Format", "export_run"]
