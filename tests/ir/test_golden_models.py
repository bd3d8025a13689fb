"""The first golden graphs: what capture and the text make of two small models."""

import pytest

from tests.ir.small_models import small_cnn, small_transformer


@pytest.mark.golden("ir/small_cnn")
def test_small_cnn(golden_graph):
    golden_graph(small_cnn())


@pytest.mark.golden("ir/small_transformer")
def test_small_transformer(golden_graph):
    golden_graph(small_transformer())
