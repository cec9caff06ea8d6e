"""Kernels run by Triton's interpreter, without a GPU."""

import os
import subprocess
import sys


def let_the_interpreter_multiply_bfloat16():
    """Triton 3.9's takes the bits of bfloat16 for the numbers that it multiplies."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def in_the_interpreter(script):
    """Run a script, which has to end well, in a process of its own: Triton asks for its interpreter when imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
