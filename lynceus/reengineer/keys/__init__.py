"""One small file per family: how a parity record is rebuilt and compared.

A family's file holds

    SOURCES                                    # re-exported from lynceus.backbones.keys.<family>: foreign names -> ours
    build(config: dict) -> nn.Module           # from a parity record's config (the authors' constructor names)
    compare(model, inputs, record) -> dict[str, Tensor]   # the record's named outputs, from our model

    tolerances(record) -> dict[str, tuple[float, str]]    # optional: output -> (tolerance, why it is not 1e-6)

Records that hold no network (losses, operators, metrics) are compared by a function of their own, listed beside these
in `lynceus.reengineer.parity`.
"""
