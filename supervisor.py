"""The parent: it opens everything, forks workers, replaces those that die, and whole generations of them on a reload.

A generation is what one load has made (archives, TLS contexts, the access log) and the workers that serve it. The next
one is loaded and its workers are ready before those of the one before are told to retire; if that fails, nothing has
changed. The listening sockets belong to none of them.

Facts about signals
  * Python's handlers run between two instructions of this process, also while it loads: SIGTERM can break a load off.
  * Forking happens with all of them blocked: until a child has its own handlers, it would report to the parent's pipe.

What systemd's watchdog is promised: each half of its time SIGALRM comes, and it is fed
  * by the loop, once the signal has come out of the loop's pipe: a loop that hangs feeds nothing;
  * while the loop waits for workers, which it does for START_WITHIN or RETIRE_WITHIN seconds at the most;
  * while a load moves on, however long it takes: where this process, its threads included, has used the processor since
    SIGALRM came last. A load that waits for a disk which gives nothing feeds nothing.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import time
from typing import Any

from clock import END_NOW, LOOK_AGAIN, NEW_LOG
from linux import die_with_parent
from options import MAX_WORKERS

log = logging.getLogger("tarweb")

ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT
HANDLED = {*ENDING, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM}
BLOCKED = {*HANDLED, signal.SIGUSR2, END_NOW, LOOK_AGAIN, NEW_LOG}     # while a child has no handlers yet
STATUS = -1                     # the number of the process that answers the status listener
LONGEST_WAIT = 3600             # seconds after which secrets of session tickets are looked at, if nothing else is due
YOUNG = 10                      # seconds: who dies sooner is replaced after a while only
BACK_OFF = 0.1, 30              # seconds: the first while, and the longest; it doubles each time
FLUX = 3                        # seconds after a write to an archive that it is looked at again and again
START_WITHIN = 60               # seconds for a worker to be ready: it takes a fraction of one where nothing hangs, and
                                # some where all that is in memory has to be mapped or the machine swaps
RETIRE_WITHIN = 5               # seconds that a reload waits for the old workers to accept no more
OVERDUE = 5                     # seconds beyond their time after which workers that do not end are killed
MOVES = 0.001                   # seconds of processor time: the least that a load which moves on uses meanwhile
READY, LEFT = b"1", b"0"        # a worker takes requests; it accepts no more
EXIT_FAILURE = 1


class Interrupted(BaseException):
    """Told to end while loading."""


class Process:
    """A child. number: of the worker among those of its generation. row: its row of the Scoreboard.

    channel: a socket out of which READY and LEFT come, and the end when it is no more; an access log that has been
    opened anew goes the other way, and NEW_LOG tells of it.
    """

    def __init__(self, pid, number, row, generation, channel):
        self.pid, self.number, self.row, self.generation, self.channel = pid, number, row, generation, channel
        self.born = time.monotonic()
        self.dismissed = False          # killed by us


class NoScoreboard:
    """Stands for metrics.Scoreboard where nobody asks for numbers: keeps none."""

    def ignore(self, *_, **__):
        pass

    take_row = free_row = set = add = introduce = ignore


class Supervisor:
    """Runs workers until told to end.

    load(previous Generation or None, same_sites) -> a Generation. child(Generation or None, number, row, ready, left)
    is the whole life of a child process, and gives its exit status; it calls `ready` when it takes requests, and `left`
    when it accepts no more. on_ready(Generation) is called once the first workers serve.
    """

    def __init__(self, options, listeners, scoreboard, notifier, load, child, on_ready):
        self.options, self.listeners, self.scoreboard = options, listeners, scoreboard or NoScoreboard()
        self.notifier, self.load, self.child, self.on_ready = notifier, load, child, on_ready
        self.generation: Any = None
        self.number = 0                 # of the generation
        self.processes = {}             # pid: Process
        self.due = {}                   # number: when to fork the one that replaces a dead worker
        self.back_off = {}              # number: how long the next one of this number waits, if it has to
        self.loading = False
        self.waits_until = 0.0          # when waiting for workers is over
        self.used = 0.0                 # processor time when SIGALRM came last
        self.stopping = False
        self.kill_at = None             # when those who have not ended are killed
        self.drain_at = None            # when the lame duck's time is over
        self.look_at = 0.0 if options.watch else None       # when to look whether files have changed
        self.look_until = 0.0           # how long to go on with that
        self.pid = os.getpid()
        self.pipe, self.wake_end = os.pipe()
        for end in (self.pipe, self.wake_end):
            os.set_blocking(end, False)

    @property
    def workers(self):
        """Those of all generations."""
        return [process for process in self.processes.values() if process.number != STATUS]

    # the sequence

    def run(self):
        """Load, serve, end; gives the exit status. Raises what `load` raises the first time."""
        self.watch_signals()
        try:
            return self.serve()
        finally:                            # or it would be our end, once Python has taken its handlers away
            signal.setitimer(signal.ITIMER_REAL, 0)

    def serve(self):
        try:
            generation = self.load_next(False)
        except Interrupted:
            return 0
        if not self.start(generation):
            for pid in self.processes:      # all of them killed
                os.waitpid(pid, 0)
            return EXIT_FAILURE
        self.scoreboard.set(started=time.time())
        self.take_over(generation)
        if self.listeners.status:
            self.fork(None, STATUS)
        self.on_ready(generation)
        self.notifier.ready(generation.words())
        while self.serving or self.processes:
            try:
                self.wait()
            except (OSError, MemoryError) as error:         # those who serve, serve on; it is tried again
                log.error("supervisor: %s", getattr(error, "strerror", "") or "no memory")
                time.sleep(1)
        return 0

    def wait(self):
        """Until something happens or is due; then see to it."""
        poller = select.poll()
        poller.register(self.pipe, select.POLLIN)
        if self.generation.inotify >= 0 and not self.stopping:
            poller.register(self.generation.inotify, select.POLLIN)
        monotonic = time.monotonic()
        due = [at for at in (*self.due.values(), self.look_at, self.drain_at, self.kill_at) if at is not None]
        poller.poll(max(0, min(due, default=monotonic + LONGEST_WAIT) - monotonic) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            for number in dict.fromkeys(os.read(self.pipe, 4096)):      # each once
                self.on_signal(number)
        self.reap()
        self.on_time(time.monotonic())

    @property
    def serving(self):
        """Whether requests are to be taken: not once told to stop, and the lame duck's time is over."""
        return not self.stopping or self.drain_at is not None

    # signals

    def watch_signals(self):
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)
        for number in HANDLED:
            signal.signal(number, self.on_signal_now)
        if self.notifier.watchdog_seconds:
            signal.setitimer(signal.ITIMER_REAL, self.notifier.watchdog_seconds, self.notifier.watchdog_seconds)

    def on_signal_now(self, number, _frame):
        """What cannot wait; the rest is `on_signal`, when nothing else is being done."""
        if number == signal.SIGALRM:
            before, self.used = self.used, time.process_time()
            if time.monotonic() < self.waits_until or self.loading and self.used - before > MOVES:
                self.notifier.watchdog()
        elif number in ENDING and self.loading:
            self.loading = False
            raise Interrupted

    def on_signal(self, number):
        if number in ENDING:
            self.stop()
        elif number in (signal.SIGHUP, signal.SIGUSR1) and not self.stopping:
            self.reload(same_sites=number == signal.SIGUSR1)    # workers have the log as they were forked with it
        elif number == signal.SIGALRM:
            self.notifier.watchdog()

    def on_time(self, monotonic):
        for number in [number for number, at in self.due.items() if at <= monotonic and self.serving]:
            del self.due[number]
            process = self.fork(None if number == STATUS else self.generation, number)
            if process is None:
                self.due[number] = monotonic + 1
            elif self.stopping and number != STATUS:
                os.kill(process.pid, signal.SIGUSR1)        # waits until it has a handler
        if self.drain_at is not None and monotonic >= self.drain_at:
            self.drain()
        if self.kill_at is not None and monotonic >= self.kill_at:
            self.kill_at = monotonic + OVERDUE
            self.tell(signal.SIGKILL)
        if not self.serving and not self.workers:
            self.tell(signal.SIGTERM)
        if self.generation.tls:             # or this process could tell what the secrets of the past have become
            self.generation.tls.tickets.advance(time.time())
        if not self.stopping:
            self.look_at_files(monotonic)
        self.report(not self.stopping)

    def look_at_files(self, monotonic):
        """Reload where they have changed. Without --watch that is of interest only while they are written to."""
        if self.generation.in_flux():
            self.look_until, self.look_at = monotonic + FLUX, self.look_at or monotonic
        if self.look_at is None or monotonic < self.look_at:
            return
        self.look_at = monotonic + 1 if self.options.watch or monotonic < self.look_until else None
        if self.generation.changed():
            self.reload()

    # children

    def fork(self, generation, number):
        """A child that serves; gives its Process, or None where there cannot be another one."""
        if number != STATUS and len(self.workers) >= MAX_WORKERS:
            log.error("too many workers are still finishing what they were sending: no new one")
            return None
        row, pid = self.scoreboard.take_row(), None
        ends: tuple[socket.socket, ...] = ()
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            ends = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            log.error("cannot start a worker: %s", error.strerror)
        if pid == 0:
            self.be_child(generation, number, row, ends[1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
        if pid is None:
            for end in ends:
                end.close()
            self.scoreboard.free_row(row)
            return None
        ends[1].close()
        self.processes[pid] = Process(pid, number, row, generation, ends[0])
        return self.processes[pid]

    def be_child(self, generation, number, row, its_end):
        """Never returns."""
        status = EXIT_FAILURE
        try:
            signal.set_wakeup_fd(-1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for fd in (self.pipe, self.wake_end):
                os.close(fd)
            for process in self.processes.values():
                process.channel.close()
            if self.generation not in (None, generation):       # it takes space on the disk as long as it is open
                self.generation.close_all_but(generation)
            if generation:
                generation.channel = its_end
            die_with_parent(signal.SIGTERM, self.pid)

            def ready():
                signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
                os.write(its_end.fileno(), READY)

            def left():
                with contextlib.suppress(OSError):      # the parent may be no more
                    os.write(its_end.fileno(), LEFT)

            status = self.child(generation, number, row, ready, left)
        finally:
            os._exit(status)

    def forget(self, process):
        process.channel.close()
        self.scoreboard.free_row(process.row)

    def start(self, generation):
        """Fork all workers of a generation; tell whether all of them are ready to serve. If not, they are killed."""
        gc.collect()
        gc.freeze()             # in a worker the collector would write to all that is shared by then
        forked = list(filter(None, [self.fork(generation, number) for number in range(self.options.threads)]))
        said = self.wait_for(forked, START_WITHIN, (READY, b""))
        if list(said.values()) == [READY] * self.options.threads:
            return True
        for process in forked:
            process.dismissed = True
            if process not in said:
                log.error("worker %d was not ready within %d s: killed", process.pid, START_WITHIN)
            elif not said[process]:         # it has ended, and has said why unless a signal has ended it
                del self.processes[process.pid]
                self.forget(process)
                _, ended = os.waitpid(process.pid, 0)
                if os.WIFSIGNALED(ended):
                    log.error("worker %d could not begin to serve: %s", process.pid, words(ended))
        self.tell(signal.SIGKILL, generation)
        return False

    def wait_for_leave(self, generation):
        """Until the workers of a generation accept no more. One that has not managed that within RETIRE_WITHIN seconds
        is killed: as the first to wait at a listener it would be given each connection, and do nothing with it."""
        old = [process for process in self.workers if process.generation is generation]
        left = self.wait_for(old, RETIRE_WITHIN, (LEFT, b""))
        for process in old:
            if process not in left:
                log.error("worker %d, which was to retire, does not do anything: killed", process.pid)
                process.dismissed = True
                os.kill(process.pid, signal.SIGKILL)

    def wait_for(self, processes, seconds, answers):
        """{process: what came out of its channel}, once each has given one of these answers, or without those
        that have given none within so many seconds."""
        poller, said = select.poll(), {}
        waiting = {process.channel.fileno(): process for process in processes}
        for channel in waiting:
            poller.register(channel, select.POLLIN)
        self.waits_until = time.monotonic() + seconds
        while waiting and (left := self.waits_until - time.monotonic()) > 0:
            for channel, _ in poller.poll(1000 * left):
                try:
                    answer = os.read(channel, 1)
                except ConnectionResetError:        # it has ended before it took a new log (unix(7))
                    answer = b""
                if answer in answers:
                    poller.unregister(channel)
                    said[waiting.pop(channel)] = answer
        self.waits_until = 0.0
        return said

    def tell(self, number, generation=None):
        """Send a signal to all children, or to those of one generation."""
        for process in self.processes.values():
            if generation is None or process.generation is generation:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def reap(self):
        while self.processes:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            process = self.processes.pop(pid, None)
            if process is not None:
                self.forget(process)
                self.on_death(process, ended)

    def on_death(self, process, ended):
        """A worker that is still wanted is replaced."""
        if ended:
            self.tell(LOOK_AGAIN)
        if not self.serving or process.generation is not self.generation and process.number != STATUS:
            if ended and not process.dismissed and self.kill_at is None:
                log.warning("worker %d, which was to end, ended: %s", process.pid, words(ended))
            return
        monotonic, wait, back_off = time.monotonic(), 0, self.back_off.pop(process.number, BACK_OFF[0])
        if monotonic - process.born < YOUNG:
            wait, self.back_off[process.number] = back_off, min(2 * back_off, BACK_OFF[1])
        self.due[process.number] = monotonic + wait
        self.scoreboard.add("restarts")
        log.error("worker %d ended: %s; another one takes its place%s", process.pid, words(ended),
                  f" in {wait:g} s" if wait else "")

    # generations

    def load_next(self, same_sites):
        self.loading = True
        try:
            return self.load(self.generation, same_sites)
        finally:
            self.loading = False

    def reload(self, same_sites=False):
        """Have a new generation take over; if anything is wrong with it, the present one serves on."""
        self.notifier.reloading()
        before = self.generation
        try:
            after = self.load_next(same_sites)
        except Interrupted:
            return
        except Exception as error:          # whatever it is, a lack of memory too
            self.on_reload_failure(error, same_sites)
            return
        self.pass_log(before, after)
        if not self.start(after):
            after.close_all_but(before)
            self.on_reload_failure("its workers did not start", same_sites)
            return
        self.tell(signal.SIGUSR2, before)
        self.take_over(after)
        self.wait_for_leave(before)
        before.close_all_but(after)
        self.scoreboard.add("reloads")
        if not same_sites:
            self.scoreboard.set(last_reload=time.time())
        what = "has the access log opened anew, and serves what was served" if same_sites else f"serves {after.words()}"
        log.info("reloaded: generation %d %s", self.number, what)
        self.notifier.ready(after.words())

    def pass_log(self, before, after):
        """Have those who serve write to the access log that has been opened anew from now on, also while they retire:
        the file that they had may be compressed, and removed, at any moment."""
        if after.log_fd in (-1, 1):                     # 1: standard output
            return
        os.dup2(after.log_fd, before.log_fd, inheritable=False)     # for whoever takes a dead worker's place
        for process in self.workers:
            with contextlib.suppress(OSError):          # it is no more, or has not looked for a long time
                socket.send_fds(process.channel, [b"1"], [after.log_fd], socket.MSG_DONTWAIT)
                os.kill(process.pid, NEW_LOG)

    def take_over(self, generation):
        self.generation = generation
        self.number += 1
        self.due = {number: at for number, at in self.due.items() if number == STATUS}
        self.scoreboard.set(generation=self.number)
        self.scoreboard.introduce(generation, self.number, self.listeners.urls(generation.scheme))
        self.report(True)

    def on_reload_failure(self, reason, same_sites):
        reason = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        if same_sites:
            self.generation.log_error = reason
        else:
            self.generation.failed(reason)
        self.scoreboard.introduce(self.generation, self.number, self.listeners.urls(self.generation.scheme))
        self.scoreboard.add("reloads_failed")
        self.scoreboard.set(last_reload=time.time())
        log.error("reload failed, generation %d still serves: %s", self.number, reason)
        self.notifier.ready(f"reload failed: {reason}")

    # the end

    def stop(self):
        """Drain and end, after the lame duck's time; each further time, go on to the next of these at once."""
        if self.stopping:
            if self.drain_at is None:
                self.tell(END_NOW)
            else:
                self.drain()
            return
        self.stopping, self.look_at = True, None
        self.notifier.stopping()
        self.report(False)
        if self.options.lame_duck:
            self.drain_at = time.monotonic() + self.options.lame_duck
            self.tell(signal.SIGUSR1)
        else:
            self.drain()

    def drain(self):
        self.drain_at, self.due = None, {}
        self.kill_at = time.monotonic() + self.options.drain + OVERDUE
        for process in self.workers:
            os.kill(process.pid, signal.SIGTERM)
        self.listeners.close_site()

    def report(self, ready):
        serving = sum(process.generation is self.generation for process in self.workers)
        self.scoreboard.set(ready=ready and serving > 0, stopping=self.stopping, workers=serving,
                            draining=len(self.workers) - serving)


def words(ended):
    """What os.wait says of a process's end, in words."""
    code = os.waitstatus_to_exitcode(ended)
    if code == -signal.SIGSYS:
        return "SIGSYS, a system call that it may not make (see sandbox.py; --secure=off allows all)"
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name
