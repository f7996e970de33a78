"""What is asked of Ray Data's own insides is there."""

from types import SimpleNamespace

from ray.data._internal.execution.operators.map_operator import MapOperator

from pipeline.cluster import ForgetBlocks


def test_figures_of_blocks_are_forgotten_where_ray_keeps_them() -> None:
    assert "_output_blocks_stats" in MapOperator.__init__.__code__.co_names
    operator = SimpleNamespace(_output_blocks_stats=[1, 2])
    executor = SimpleNamespace(_topology=[operator, SimpleNamespace()])
    ForgetBlocks().on_execution_step(executor)
    assert operator._output_blocks_stats == []
