"""The ring's controller: observe everything, plan, change one thing, say it in a sentence.

`assignment` and `planning` are pure; `controller` is the loop; `local` runs it over files (Kubernetes comes later).
The folder `operator/` above must never become importable: it would shadow Python's own module.
"""
