"""Paths and globs, against a matcher that is slow and plain."""

import chex
import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import ConfigError, leaf_names, map_with_name, mask, matches, path_name


def segment_matches(name, glob):
    if not glob:
        return not name
    if glob[0] == "*":
        return segment_matches(name, glob[1:]) or (bool(name) and segment_matches(name[1:], glob))
    return bool(name) and glob[0] in ("?", name[0]) and segment_matches(name[1:], glob[1:])


def path_matches(names, globs):
    """Try each way of spending the names; ``**`` takes any number, at the end at least one."""
    if not globs:
        return not names
    if globs == ["**"]:
        return bool(names)
    if globs[0] == "**":
        return path_matches(names, globs[1:]) or (bool(names) and path_matches(names[1:], globs))
    return (
        bool(names) and segment_matches(names[0], globs[0]) and path_matches(names[1:], globs[1:])
    )


# Letters that mean something in a regular expression, and few enough to collide often.
letters = "ab.+(["
segments = st.text(letters, min_size=1, max_size=3)
names = st.lists(segments, min_size=1, max_size=4)
globs = st.lists(
    st.just("**") | st.text(letters + "*?", min_size=1, max_size=3), min_size=1, max_size=4
)


@settings(deadline=None)
@given(names, globs)
def test_matches_as_the_plain_matcher_does(name, glob):
    assert matches("/".join(name), "/".join(glob)) == path_matches(name, glob)


@settings(deadline=None)
@given(names, st.data())
def test_a_glob_made_from_a_path_matches_it(name, data):
    glob = []
    for segment in name:
        glob += data.draw(
            st.sampled_from([[segment], ["*"], ["**"], ["**", segment], ["?" * len(segment)]])
        )
    assert matches("/".join(name), "/".join(glob))
    assert path_matches(name, glob)


@settings(deadline=None)
@given(names, st.lists(globs, max_size=3))
def test_several_globs_match_if_one_does(name, many):
    texts = ["/".join(glob) for glob in many]
    assert matches("/".join(name), texts) == any(matches("/".join(name), text) for text in texts)


@pytest.mark.parametrize(
    ("name", "glob", "expected"),
    [
        ("kernel", "**/kernel", True),
        ("a/b/kernel", "**/kernel", True),
        ("a/mykernel", "**/kernel", False),
        ("a/b", "a/**/b", True),
        ("a/x/y/b", "a/**/b", True),
        ("ab", "a**b", True),
        ("a/b", "a**b", False),
        ("a", "a/**", False),
        ("a/b/c", "a/**", True),
        ("a/b", "a", False),
        ("axb", "a.b", False),
        ("", "**", True),
    ],
)
def test_matches_by_example(name, glob, expected):
    assert matches(name, glob) is expected


TREE = {"blocks": [{"kernel": 1.0, "bias": 2.0}, {"kernel": 3.0}], "head": (4.0, None)}
NAMES = ["blocks/0/bias", "blocks/0/kernel", "blocks/1/kernel", "head/0"]


def test_names_are_in_the_order_of_the_leaves():
    assert leaf_names(TREE) == NAMES
    assert leaf_names(1.0) == [""]
    assert [path_name(path) for path, _ in jax.tree.leaves_with_path(TREE)] == NAMES


def test_map_with_name_keeps_the_structure_and_passes_the_other_trees():
    result = map_with_name(lambda name, x, y: (name, x + y), TREE, TREE)
    expected = [(name, 2 * leaf) for name, leaf in zip(NAMES, jax.tree.leaves(TREE), strict=True)]
    assert (
        jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, tuple) and x[0] in NAMES)
        == expected
    )


def test_mask_selects_by_any_of_the_globs():
    found = mask(TREE, ["**/bias", "head/*"])
    chex.assert_trees_all_equal_structs(found, TREE)
    assert jax.tree.leaves(found) == [True, False, False, True]


def test_a_glob_that_selects_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError) as error:
        mask(TREE, ["**/bias", "blocks/0/kernle"])
    assert "'blocks/0/kernle' matches none of the 4 parameter paths" in str(error.value)
    assert "Did you mean 'blocks/0/kernel'" in str(error.value)


def test_a_path_with_a_line_break_is_matched():
    assert matches("a\nb/kernel", "**/kernel")
