"""What a run writes down about its code."""

import subprocess

from kd.io import manifest


def test_a_commit_tells_of_changes_in_the_folders_asked_for(tmp_path, monkeypatch):
    root = tmp_path / 'tree'
    for folder in ('kd', 'docs'):
        (root / folder).mkdir(parents=True)
        (root / folder / 'file').write_text('before')
    monkeypatch.setattr(manifest, '_ROOT', root / 'kd')
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    assert manifest.commit() == manifest.commit('kd') == ''

    def git(*arguments):
        identity = ['-c', 'user.name=A', '-c', 'user.email=a@b']
        command = ['git', '-C', str(root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git('init')
    git('add', '.')
    git('commit', '-m', 'First')
    head = git('rev-parse', 'HEAD')
    assert manifest.commit() == manifest.commit('kd') == head
    (root / 'docs' / 'file').write_text('after')
    assert manifest.commit('kd') == head
    assert manifest.commit('kd', 'docs') == manifest.commit() == head + '+'
