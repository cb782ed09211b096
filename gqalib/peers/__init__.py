"""The methods that a user would otherwise pick, each compact and as its source describes it, on one model class and
one budget.

    peer(model, windows, fraction, multiple=1)

prunes a dense model in place: `windows` is the calibration text, token ids [count, length]; `fraction` is the part of
the backbone (parameters of the attention and MLP projections, biases included) to remove. Width pruners meet it within
one MLP channel where one fits, depth pruners within one layer. All end in the uneven model class, so that what they
leave is counted, saved and measured alike. A model is left as it was when a peer raises.

The unit of attention is the whole GQA group for every peer but torch-pruning's own mode. The sources remove single
heads of MHA models; on a GQA model a removed query head saves no key, no value and no cache, and a KV head removed
without its query heads breaks the pairing (02_v2_failure), so the group is the choice that favours the peer. Where a
source leaves another choice open, the docstring of the peer says which one was taken. Of `multiple` the channels that
stay in a layer are a whole number; FLAP's one ranking over all layers and the depth pruners set their own widths and
take none. 2SSP leaves layers without attention; what cuts groups refuses to prune such a model again.

`v2`, the pipeline whose failure the workbook starts from, meets no budget and is no such peer. `measure.frontier` has
the names that tables and commands use.
"""
