"""One small file per family: how its authors', timm's and torchvision's names and options become ours.

A family's file holds

    SOURCES: dict[str, tuple[Rule, ...]]      # "authors", "timm", "torchvision" -> rules, foreign name -> ours
    build(config: dict) -> nn.Module           # from a parity record's config (the authors' constructor names)
    compare(model, inputs, record) -> dict[str, Tensor]   # the record's named outputs, from our model

Records that hold no network (losses, operators, metrics) are compared by a function of their own, listed beside these in
`lynceus.reengineer.parity`.
"""
