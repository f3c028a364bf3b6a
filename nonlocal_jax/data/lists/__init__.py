"""Lists of videos.

`records` holds what they contain, `formats` parses each format, `text` splits lines, `folders`
looks up files, `class_folders` reads folders instead of lists, and `writing` writes lists.
"""
