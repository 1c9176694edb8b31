"""Nets that nobody prepared anything for: quantized, exported and run, one line of a table each.

    python benchmarks/architectures.py                                    # all of NETS, for half an hour or so
    python benchmarks/architectures.py mobilenetv4_hybrid_medium torchvision/swin_t

W8A8 by method mse, target onnxruntime, 16 of the built-in photographs, 8 others to compare on. Weights are random, and
parameters that start at (nearly) nothing, such as layer scales, are drawn anew, since nothing would pass through them:
this shows that a net goes through and what its file computes, not how well it would keep its accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from qhyvit import evaluate, load_model, quantize, verify
from qhyvit.errors import QhyvitError

NETS = (
    *("coat_lite_tiny", "coatnet_pico_rw_224", "convit_tiny", "convnext_atto", "crossvit_tiny_240", "davit_tiny"),
    *("edgenext_xx_small", "efficientvit_b0", "efficientvit_m0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny"),
    *("ghostnet_100", "gmlp_s16_224", "hiera_tiny_224", "inception_next_atto", "levit_128s", "mambaout_femto"),
    *("maxvit_pico_rw_256", "mobilenetv3_small_100", "mobilenetv4_hybrid_medium", "nest_tiny", "nextvit_small"),
    *("pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnety_002", "repvit_m0_9", "resmlp_12_224", "rexnet_100"),
    *("shvit_s1", "starnet_s1", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tf_efficientnetv2_b0"),
    *("tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "visformer_tiny", "vit_tiny_patch16_224"),
    *("volo_d1_224", "xcit_nano_12_p16_224", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5"),
    *("torchvision/swin_t", "torchvision/maxvit_t"),
)
NOTHING = 1e-3  # largest weight of a parameter through which nothing passes
HEADER = "| net | simulated against float | runtime against simulated | operators in integers, in float |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NET")
    print(f"{HEADER}\n|---|---:|---:|---|", flush=True)
    for line in lines(parser.parse_args().nets):
        print(line, flush=True)


def lines(nets: list[str] | tuple[str, ...]) -> Iterator[str]:
    """One line a net; of those that are refused, the reason."""
    for name in nets:
        try:
            cells = _measured(name)
        except QhyvitError as error:
            cells = [str(error).replace("|", "/"), "", ""]
        yield f"| `{name}` | {' | '.join(cells)} |"


def _measured(name: str) -> list[str]:
    torch.manual_seed(0)
    loaded = load_model(name)
    draw_what_is_nothing(loaded.module)
    quantized = quantize(loaded, calib="photos", method="mse", calibration={"size": 16})
    simulated = evaluate(quantized, limit=8, deployed=False)["simulated"]
    assert simulated is not None
    deployed = verify(quantized, limit=8)
    operators = f"{deployed.integer_ops}, {deployed.float_ops}"
    return [f"{simulated.sqnr_db:.1f} dB", f"{deployed.sqnr_db:.1f} dB", operators]


def draw_what_is_nothing(module: nn.Module) -> None:
    """Normal numbers for every parameter that lets nothing through."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() < NOTHING:
                nn.init.normal_(parameter, std=0.1)


if __name__ == "__main__":
    main()
