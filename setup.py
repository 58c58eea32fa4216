"""Package map: `kernels/` stands beside the library and is imported as `megaspeech.kernels`; the page goes along."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["megaspeech", "megaspeech.*"]),
        "megaspeech.kernels",
        *(f"megaspeech.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"megaspeech.kernels": "kernels"},
    package_data={"megaspeech.streaming": ["page/*"]},
)
