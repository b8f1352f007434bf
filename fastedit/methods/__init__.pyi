# What methods/__init__.py loads on first use; tests/pages/test_types.py compares the two.

from . import cast as cast
from . import inferaligner as inferaligner
from . import rahf as rahf
from . import rahf_student as rahf_student
from . import rahf_teachers as rahf_teachers
from . import recontrol as recontrol
from . import recontrol_report as recontrol_report
from . import roleref as roleref
from . import ubpl as ubpl
