"""From files to batches: sources, transforms, pipelines. NumPy, Pillow and grain; never JAX.

    sources = open_sources(config)                       # `sources.open`: checks lists and image headers.
    dataset = train_dataset(sources, config)             # `pipeline`: dataset[step] is a batch.
    for batch in train_iterator(dataset, config): ...
    for batch in eval_groups(sources.val, ...): ...      # `eval_batches`: images of any size, padded.

Every problem with the data is raised as a `DataError` that names the file.
"""
