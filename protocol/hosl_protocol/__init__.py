"""What crosses the wire and what both sides must compute alike: no sockets, no files of weights, no torch.

program     what the three commands share: options, logs, exit codes, proxies
arithmetic  directions from seeds, the lattice, and the pass that adds directions to weights
run         settings and tasks of a run, the manifest of a bundle, the rate's schedule, the order of examples
weights     the client's weights: probes, SGD (`ClientWeights._apply_sgd`), AdamW, the bound that keeps sums exact
wire        messages, their frames, and who may say what when
"""
