"""The kernels: functions on arrays, without autograd, dispatch or validation.

Import them as `grand_fast.kernels`; the bare name `kernels` belongs to another package.
"""

if __name__ == "kernels":
    raise ImportError(
        "kernels: import `grand_fast.kernels`; the bare name `kernels` is another package's."
    )
