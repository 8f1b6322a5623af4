"""How tfspark is packaged; its tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = "0.1.0"

PLOTS = ["matplotlib>=3.8"]
ENCRYPTION = ["cryptography>=42"]
EXAMPLES = ["scikit-learn>=1.4", "scipy>=1.11", *PLOTS]
TEST = [
    *ENCRYPTION,
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "tensorboard>=2.18",
    "tf-slim>=1.1",
]

readme = HERE / "README.md"

setup(
    name="tfspark",
    version=VERSION,
    description="Train TensorFlow and Keras models inside Spark tasks, on the data where it lies",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tfspark", "tfspark.*"]),
    package_data={"tfspark": ["py.typed"]},
    entry_points={"console_scripts": ["tfspark=tfspark.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "fsspec>=2024.2",
        "h5py>=3.10",
        "keras>=3.5",
        "numpy>=1.26",
        "optree>=0.12",
        "pandas>=2.0,<3",
        "pyarrow>=14",
        "pyspark>=3.5,<5",
        "tensorflow-cpu>=2.18",
        "tf2onnx>=1.16",
        "tqdm>=4.66",
    ],
    extras_require={"encryption": ENCRYPTION, "plots": PLOTS, "examples": EXAMPLES, "test": TEST},
    classifiers=[
        "Intended Audience :: Developers",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
