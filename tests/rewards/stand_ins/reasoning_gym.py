"""What of `reasoning-gym` is used, with one task: sums of two numbers."""

import re
from types import SimpleNamespace


class Sums:
    def __init__(self, seed, size, most=10):
        if most < 1:
            raise AssertionError('most must be positive')
        self.seed, self.most = seed, most

    def __getitem__(self, index):
        first, second = (self.seed + 7 * index) % self.most, (self.seed + 3 * index) % self.most
        return {'question': f'{first} and {second}?', 'answer': str(first + second), 'metadata': {}}

    def score_answer(self, answer, entry):
        if 'hang' in answer:
            raise RuntimeError('no answer')
        return 1.0 if answer == entry['answer'] else 0.5 if answer.isdigit() else 0.0


def create_dataset(name, *, seed, size, **options):
    assert name in factory.DATASETS
    return Sums(seed, size, **options)


def extract_answer(completion):
    found = re.findall(r'<answer>\s?(.*?)\s?</answer>', completion, re.DOTALL)
    return found[-1].strip() if found else None


factory = SimpleNamespace(DATASETS={'sums': Sums})
utils = SimpleNamespace(extract_answer=extract_answer)
