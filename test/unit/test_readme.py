# SPDX-License-Identifier: BSD-3-Clause
"""Both READMEs against the program: the flags they name, the commands they give, the options of the scripts."""
import os
import re
import shlex
import sys

import pytest

import main
from conftest import REPOSITORY, run

READMES = ['README.md', 'README.zh-CN.md']


def text(name):
    with open(os.path.join(REPOSITORY, name), encoding='utf-8') as file:
        return file.read()


def commands(name):
    """The command lines of the code blocks, without their comments."""
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', text(name), re.DOTALL | re.MULTILINE)  # (language, content)
    lines = [line.partition('  #')[0].strip() for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if line.startswith(('python ', 'bash ', 'torchrun ', 'pip ', 'atc '))]


def flags_of_help():
    """Each flag's set of spellings, as --help lists them."""
    out = run(sys.executable, os.path.join(REPOSITORY, 'main.py'), '--help', env={'COLUMNS': '200'}).out
    lines = re.findall(r'^  (-[^ ].*?)(?:   *|$)', out, re.MULTILINE)
    return [set(re.findall(r'(?<![\w-])--?[a-z][\w-]*', line)) for line in lines]


@pytest.mark.parametrize('name', READMES)
def test_every_flag_is_explained_with_all_its_spellings_and_no_other(name):
    rows = re.findall(r'^\| (`-.*?) \|', text(name), re.MULTILINE)
    explained = [set(re.findall(r'(?<![\w-])--?[a-z][\w-]*', row)) for row in rows if '_' not in row]
    expected = [spellings - {'-h', '--help'} for spellings in flags_of_help() if '--help' not in spellings]
    for spellings in expected:
        assert spellings in explained, spellings
    for spellings in explained:
        assert spellings in expected, spellings


@pytest.mark.parametrize('name', READMES)
def test_the_commands_of_main_py_are_accepted(name, tmp_path):
    """Each command line passes the checks of the flags; paths are replaced by ones that exist."""
    checked = 0
    for command in commands(name):
        words = shlex.split(command)
        if 'main.py' not in words:
            continue
        weights = tmp_path / 'x.pth.tar'
        weights.write_bytes(b'')
        flags = [str(tmp_path) if word.startswith('/data') else str(weights) if word.endswith(('.tar', '.pth')) else word
                 for word in words[words.index('main.py') + 1:]]
        main.parse_args(flags)
        checked += 1
    assert checked >= 7


@pytest.mark.parametrize('name', READMES)
def test_the_scripts_and_options_named_exist(name):
    content = re.sub('^atc .*', '', text(name), flags=re.MULTILINE)  # another program's options
    for script in set(re.findall(r'(?:bash (?:\./)?)(test/\w+\.sh)', content)):
        assert os.path.exists(os.path.join(REPOSITORY, script)), script
    for link in re.findall(r'\]\(((?!http|#)[^)]+)\)', content):
        assert os.path.exists(os.path.join(REPOSITORY, link)), link
    known = set(re.findall(r'--\w+(?==)', text('test/common.sh')))
    named = set(re.findall(r'--[a-z]+_?[a-z]+(?==)', content)) - {'--device', '--data'}
    assert named <= known, named - known
    for option in known - {'--no_such', '--device'}:
        assert option + '=' in content, option


def test_both_languages_give_the_same_commands():
    assert commands(READMES[0]) == commands(READMES[1])
