"""A rendered world of simple shapes with exact ground truth: what a prompt asks for can be checked without a learned judge."""

from pathlib import Path

TEACHER = Path(__file__).with_name("teacher")  # the bundled teacher, an artefact folder
STUDENT_4 = Path(__file__).with_name("student_4")  # its student at 4 steps without guidance
