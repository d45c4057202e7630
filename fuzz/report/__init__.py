"""What a person or a CI service is told of a night, made of its store and the failures' folders: `view` gathers it,
`page` is the HTML page with `charts`; `junit`, `markdown` and `github` are for CI services."""
