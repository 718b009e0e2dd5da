"""Private names of other libraries that are used here: each is still there, and is what it is taken for.

A library may drop them in any release, and some uses would fail without a word. Where a test fails, look for a public
name that does the work, or for what the name has become, in the file that the test names.
"""

import argparse
import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {
    "torch._foreach_copy_": "seg_core/training/loop.py",
    "torch._foreach_sub": "seg_core/training/loop.py",
    "torch._foreach_mul_": "seg_core/training/loop.py",
    "torch._foreach_add_": "seg_core/training/loop.py",
    "rasterio._err": "seg_core/imagery/raster.py, open.py, bands.py",
    "rasterio._env": "seg_core/imagery/data_files.py",
    "argparse._SubParsersAction": "jobs/cli/parser.py",
    "argparse._ActionsContainer": "jobs/cli/option_groups.py",
    "self._get_positional_actions": "jobs/cli/parser.py",
    "ray._private": "jobs/ray_session.py, ray_node.py",
    "ray._private.ray_constants": "jobs/ray_node.py",
    "ray._private.worker._worker_logs_enabled": "jobs/ray_session.py",
    "client._server_ray_version": "jobs/submitting/dashboard.py",
    "client._do_request": "jobs/submitting/dashboard.py",
    "receipts.context._max_num_blocks_in_streaming_gen_buffer": "jobs/segment.py",
}
TYPE = re.compile(r"\w+\.\w+\[\w+(\.\w+)*\]")  # that is named in quotes
DOCUMENTED = {"os._exit", "_replace", "_fields", "_asdict", "_make"}  # those of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """The private names that this code defines itself."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def private_names(trees: list[ast.Module]) -> set[str]:
    """The private attributes and modules of others that are used."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and TYPE.fullmatch(node.value):
            found |= private_names([ast.parse(node.value)])
        elif isinstance(node, ast.ImportFrom) and any(map(is_private, (node.module or "").split("."))):
            found.add(node.module or "")
    own = own_names(trees) | DOCUMENTED
    return {name for name in found if name not in own and name.rpartition(".")[2] not in own}


def test_each_private_name_of_another_library_stands_in_this_list() -> None:
    paths = [path for folder in ("seg_core", "jobs", "cluster") for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    assert private_names(trees) - {"seg_core._version"} == set(NAMES)


def test_a_private_name_is_found_however_it_is_used() -> None:
    code = "import os\nfrom a._b import c\nself._own = os._exit\nx.y._z(1)\nself._own._replace()\n"
    assert private_names([ast.parse(code)]) == {"a._b", "x.y._z"}


def test_torch_changes_many_tensors_at_once() -> None:
    """The moving average of a network's weights: see make_average in seg_core/training/loop.py."""
    import torch

    tensors, others = [torch.ones(2), torch.zeros(3)], [torch.full((2,), 3.0), torch.ones(3)]
    change = torch._foreach_sub(others, tensors)
    torch._foreach_mul_(change, torch.tensor(0.5))
    torch._foreach_add_(tensors, change)
    assert [each.tolist() for each in tensors] == [[2.0, 2.0], [0.5, 0.5, 0.5]]
    torch._foreach_copy_(tensors, others)
    assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_rasterio_raises_gdals_own_errors_where_it_has_no_name_for_them() -> None:
    """A file that can't be read becomes failed rows only if the errors of GDAL are caught: see seg_core/imagery."""
    from rasterio import _err

    errors = [each for _, each in inspect.getmembers(_err, inspect.isclass) if issubclass(each, Exception)]
    assert len([each for each in errors if issubclass(each, _err.CPLE_BaseError)]) > 10


def test_rasterio_sets_where_gdal_and_proj_find_their_data() -> None:
    """With the data files of another installation a valid CRS is unknown: see seg_core/imagery/data_files.py."""
    from rasterio import _env

    assert callable(_env.set_proj_data_search_path)
    _env.set_gdal_config("A_NAME_OF_THESE_TESTS", "its value")
    try:
        assert _env.get_gdal_config("A_NAME_OF_THESE_TESTS") == "its value"
    finally:
        _env.del_gdal_config("A_NAME_OF_THESE_TESTS")


def test_argparse_has_types_for_commands_and_for_what_has_options() -> None:
    """They are only named in annotations: see jobs/cli/parser.py and option_groups.py."""
    parser = argparse.ArgumentParser()
    assert isinstance(parser.add_subparsers(), argparse._SubParsersAction)
    assert isinstance(parser, argparse._ActionsContainer)
    assert isinstance(parser.add_argument_group(), argparse._ActionsContainer)


def test_argparse_tells_which_arguments_are_no_options() -> None:
    """An optional argument after an option would be refused: see jobs/cli/parser.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--option")
    argument = parser.add_argument("argument", nargs="?")
    assert parser._get_positional_actions() == [argument]


def test_ray_can_be_told_not_to_print_what_goes_wrong_on_standard_output() -> None:
    """Ray would take a new variable of that name without a word, and print among results: see jobs/ray_session.py."""
    import ray

    assert isinstance(ray._private.worker._worker_logs_enabled, bool)
    assert "if not _worker_logs_enabled" in inspect.getsource(ray._private.worker)


def test_ray_starts_what_a_command_does_without_by_methods_of_a_node() -> None:
    """Methods that Ray no longer calls would be overridden without a word: see jobs/ray_node.py."""
    import ray

    calls = inspect.getsource(ray._private.node.Node)
    for method in ("start_monitor", "start_log_monitor", "start_api_server"):
        assert f"self.{method}(" in calls
    assert "ray._private.node.Node(" in inspect.getsource(ray._private.worker)


def test_ray_data_takes_how_many_receipts_may_wait_for_the_driver() -> None:
    """Its context takes any attribute without a word, and actors would wait for the driver: see jobs/segment.py."""
    from ray.data import DataContext

    assert DataContext()._max_num_blocks_in_streaming_gen_buffer > 0
