"""Package map: `kernels/` stands beside the library in the tree and is imported as `megaspeech.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["megaspeech", "megaspeech.*"]),
        "megaspeech.kernels",
        *(f"megaspeech.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"megaspeech.kernels": "kernels"},
)
