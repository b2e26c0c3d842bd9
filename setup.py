"""Packaging of kd: `pip install -e .` or `pip install -e '.[test]'`."""

from pathlib import Path

from setuptools import find_packages, setup

# `make test-lowest` runs tests with the lowest versions that these allow.
REQUIREMENTS = [
    'absl-py>=2.3.1',
    'array_record>=0.8.3',
    'clu>=0.0.12',
    'diffrax>=0.7.2',
    'einops>=0.8',
    'etils[epath,epy]>=1.15',
    'flax>=0.12.8',
    'grain>=0.2.18',
    # tfds imports it without depending on it.
    'importlib_resources>=6.5',
    'jax>=0.10.2',
    'matplotlib>=3.10',
    'ml_collections>=1.1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=11',
    'safetensors>=0.5',
    'scikit-learn>=1.6',
    'scipy>=1.15',
    'tensorboard>=2.20',
    # tfds makes its copies with it; tensorflow-cpu has wheels for x86 alone.
    'tensorflow-cpu>=2.20; platform_machine == "x86_64" or platform_machine == "AMD64"',
    'tensorflow>=2.20; platform_machine != "x86_64" and platform_machine != "AMD64"',
    'tensorflow-datasets>=4.9.10',
    'tqdm>=4.67',
]

# Tokenizers and weights of language models.
LANGUAGE_MODELS = ['gguf>=0.17', 'jinja2>=3.1', 'tokenizers>=0.21']
# Verdicts on answers to mathematical problems.
MATHEMATICS = ['math-verify>=0.8']

# Problems of logic, and verdicts on answers to them.
REASONING = ['reasoning-gym>=0.1.25']

EXTRAS = {
    'lm': LANGUAGE_MODELS,
    'math': MATHEMATICS,
    'gym': REASONING,
    'test': [
        *LANGUAGE_MODELS,
        *MATHEMATICS,
        'import-linter>=2.5',
        'mnist1d>=0.0.2.post1',
        'mypy>=2.4',
        'pytest>=9.0',
        'pytest-timeout>=2.4',
        'pytest-xdist>=3.8',
        'ruff>=0.17',
    ],
    # xmanager wants protobuf below 7; the bounds on what it pulls in spare pip an endless search.
    'launch': [
        'google-cloud-aiplatform>=2.7',
        'google-cloud-storage>=3.17',
        'google-cloud-bigquery>=3',
        'kubernetes>=37',
        'protobuf>=6.33,<7',
        'python-dateutil>=2.9,<3',
        'sqlalchemy>=2.1',
        'xmanager>=0.8.5',
    ],
    # The site of `make docs`.
    'docs': ['myst-nb>=1.4', 'sphinx>=9.0', 'sphinx-book-theme>=1.4'],
    'colab': [*LANGUAGE_MODELS, 'ipykernel>=6.29', 'nbclient>=0.10', 'nbformat>=5.10'],
    # What kd.benchmarks measures against, for a Python of its own: see kd/benchmarks/peers.
    'peers': [
        'diffusers>=0.35',
        'torch>=2.13',
        'torchdistill>=1.1.5',
        'transformers>=5.24',
        'trl>=1.16',
    ],
    'gpu': ['jax[cuda12]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
}

setup(
    name='kd',
    version='0.1.0',
    description='A reference codebase for distillation in JAX: losses, methods, recipes, theorems.',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['kd', 'kd.*']),
    package_data={'kd': ['py.typed']},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
