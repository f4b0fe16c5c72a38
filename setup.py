"""Metadata is in pyproject.toml; the pure install needs nothing more."""

from setuptools import setup

setup()
