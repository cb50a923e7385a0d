"""The script that MLflow runs to serve a Bundle: a model from code, so that nothing is pickled."""

from __future__ import annotations

import logging
from typing import Any

# MLflow warns of missing type hints when the class is made; its hints can't describe raw log rows.
_log = logging.getLogger("mlflow.models.signature"), logging.getLogger("mlflow.pyfunc.utils.data_validation")
for _logger in _log:
    _logger.setLevel(logging.ERROR)

import mlflow  # noqa: E402
import pandas as pd  # noqa: E402
import polars as pl  # noqa: E402


class SluicePyfunc(mlflow.pyfunc.PythonModel):
    """Scores a pandas frame of raw columns: click probabilities, (N,) float32."""

    def load_context(self, context: Any) -> None:
        """Load the Bundle beside this script; hashes and golden rows are checked."""
        from pipelines.release.bundle import Bundle

        self.bundle = Bundle.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Score rows; a column that is missing counts as null in every row."""
        # pandas keeps integers with gaps as floats, which the features take; a cast would make 1.5 a 1, text null.
        return self.bundle.score_frame(pl.from_pandas(model_input))


mlflow.models.set_model(SluicePyfunc())
