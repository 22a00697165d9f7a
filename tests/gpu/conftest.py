"""Triton's interpreter, without what it does again at each call inside of a kernel."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _patched_once_a_launch():
    """Half of its time: whenever one function of a kernel calls another, it looks through all of
    `triton.language` for functions to replace, and finds none after the first call."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()  # of nothing: the launch will restore it all
        done.add(module)
        scope = patch(function)
        restore = scope.restore

        def restore_all():
            done.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch
