"""What a user at the terminal sees and does while an evaluation runs."""
import contextlib
import signal
import sys


def show_epoch(epoch, epochs, text):
    """The progress of a training: on a terminal one line that changes, in a file a line per epoch."""
    line = f"  epoch {epoch + 1}/{epochs}  {text}"
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        print(f"\r{line} ", end="\n" if epoch + 1 == epochs else "", flush=True)


@contextlib.contextmanager
def stoppable(file="eval.jsonl"):
    """Ctrl-C and SIGTERM inside end the program in one line, which says that results are kept in `file`,
    with exit status 128 + the signal's number."""

    def stop(number, _):
        signal.signal(number, signal.SIG_DFL)  # the second one kills
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as e:
        print(f"\nstopped; what was measured is in {file}, the same command goes on (and takes up a "
              "classifier's training after the last epoch that was saved)", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
