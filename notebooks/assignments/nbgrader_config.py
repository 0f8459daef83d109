"""Settings of nbgrader for this course; read by every `nbgrader` command that is run in this folder."""

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "minimamba"
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError  # your code here"}
c.ClearSolutions.text_stub = "*Your answer here.*"
c.OverwriteCells.add_missing_cells = True  # a deleted test comes back, as a changed one does
c.Execute.timeout = 60  # seconds for one cell; it is then interrupted, and the next cells run
c.Execute.shutdown_kernel = "immediate"  # it has nothing to save
# What zip_collect accepts: ada_ps1.ipynb, from the student called ada.
c.FileNameCollectorPlugin.named_regexp = r"^.*?(?P<student_id>[A-Za-z0-9.-]+)_(?P<file_id>ps\d)\.ipynb$"
