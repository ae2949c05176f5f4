"""From files to batches, with NumPy, Pillow and Grain, without JAX.

    sources = open_sources(config)                              # `sources.open`: checks lists and image headers.
    dataset = train_dataset(sources, config)                    # `pipeline`: dataset[step] is a `batch.Batch`.
    for batch in train_iterator(dataset, config): ...
    for batch in eval_batches(sources.val, options): ...        # `eval_batches`: images of any size, padded.

Every problem with the data is raised as an `errors.DataError` that names the file.
"""
