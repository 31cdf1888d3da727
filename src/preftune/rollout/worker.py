"""What vLLM's worker is told to do with new weights; it runs there, in vLLM's own Python, and imports nothing of ours."""

from __future__ import annotations

from typing import Any


class Reload:
    """Mixed into the worker by --worker-extension-cls."""

    def preftune_reload(self: Any, folder: str) -> None:
        """Read the weights in `folder`, and lay out anew what a CPU keeps beside a weight and vLLM 0.32 forgets: a tied language head."""
        self.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            method, weight = getattr(module, "quant_method", None), getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and method is not None and weight is not None and weight.numel():
                method.process_weights_after_loading(module)
