import pytest
import torch

from src.errors import UsageError
from src.methods.base import Output

OUTPUT = Output(torch.tensor(1.0), torch.zeros(8, 5), torch.zeros(4, 3), torch.zeros(8))


def test_an_output_has_two_rows_of_features_and_one_embedding_for_each_image():
    OUTPUT.check(images=4)
    OUTPUT._replace(ids=None).check(images=4)


@pytest.mark.parametrize(
    ("field", "shape", "says"),
    [
        ("loss", [4], r"loss of its Output has the shape \[4\]; of 4 images it must have \[\]"),
        ("features", [4, 5], r"features of its Output has the shape \[4, 5\]; of 4 images it must have \[8, 5\]"),
        ("features", [8], r"features"),
        ("embeddings", [8, 3], r"embeddings .* \[8, 3\]; of 4 images it must have \[4, 3\]"),
        ("embeddings", [], r"embeddings"),
        ("ids", [4], r"ids .* \[8\]"),
    ],
)
def test_other_shapes_are_refused(field, shape, says):
    with pytest.raises(UsageError, match=f"method: {says}"):
        OUTPUT._replace(**{field: torch.zeros(shape)}).check(images=4)
