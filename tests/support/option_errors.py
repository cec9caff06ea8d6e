"""What is said of options that are refused."""

import pytest

from tests.support.configs import parse_options


def failure(capsys, argv, **settings) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_options(argv, **settings)
    assert stop.value.code == 2
    return capsys.readouterr().err
