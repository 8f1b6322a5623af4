import gc
import threading

from tfspark.train.leftovers import release_with


class Owner:
    """Something that holds something."""


def test_what_is_forgotten_is_released_in_another_thread():
    released = threading.Event()
    threads = []

    def release():
        threads.append(threading.current_thread())
        released.set()

    owner = Owner()
    owner.itself = owner  # a cycle: only the garbage collector finds it
    release_with(owner, release)
    gc.collect()
    assert not released.is_set()
    del owner
    gc.collect()
    assert released.wait(timeout=10)
    assert threads[0] is not threading.current_thread()


def test_what_is_released_by_hand_is_released_once():
    calls = []
    owner = Owner()
    release_now = release_with(owner, lambda: calls.append(threading.current_thread()))
    release_now()
    release_now()
    del owner
    gc.collect()

    # The thread works in order: what comes after shows that nothing is left.
    after, last = threading.Event(), Owner()
    release_with(last, after.set)
    del last
    gc.collect()
    assert after.wait(timeout=10)
    assert calls == [threading.current_thread()]
