/* The least that answering over io_uring takes: a server that looks at nothing it receives. For the benchmark alone.
 *
 *     floor PORT FILE     listens on 127.0.0.1 and sends FILE, a whole response, for each piece that it receives
 *
 * One thread, and a ring as uring.py sets it up: multishot accept, multishot receives into provided buffers, and one
 * send for each. All clients' requests have to arrive in one piece. The system calls are made without liburing, whose
 * headers few systems have; <linux/io_uring.h> comes with every C library's.
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ENTRIES = 1024, BUFFERS = 256, BUFFER_SIZE = 4096, GROUP = 0 };
enum { ACCEPT, RECEIVE, SEND };                 /* the upper half of user_data; the lower one is the descriptor */

static char response[64 * 1024];
static unsigned response_size;

static int ring;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;
static unsigned *sq_tail, *cq_head, *cq_tail, sq_mask, cq_mask;
static unsigned tail, submitted;                /* of the submission queue, counted without end */
static struct io_uring_buf_ring *buffers;
static char pool[BUFFERS][BUFFER_SIZE];

static void *map(int fd, size_t size, off_t offset)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_POPULATE;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    return memory;
}

static void set_up_ring(void)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER
            | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN,
        .cq_entries = 4 * ENTRIES,
    };
    ring = syscall(__NR_io_uring_setup, ENTRIES, &params);
    if (ring < 0)
        err(1, "io_uring_setup");
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof *cqes;
    char *rings = map(ring, sq_size > cq_size ? sq_size : cq_size, IORING_OFF_SQ_RING);
    sqes = map(ring, params.sq_entries * sizeof *sqes, IORING_OFF_SQES);
    cqes = (void *)(rings + params.cq_off.cqes);
    sq_tail = (void *)(rings + params.sq_off.tail);
    cq_head = (void *)(rings + params.cq_off.head);
    cq_tail = (void *)(rings + params.cq_off.tail);
    sq_mask = params.sq_entries - 1;
    cq_mask = params.cq_entries - 1;
    unsigned *order = (void *)(rings + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++)
        order[i] = i;
}

static void give_back(unsigned i)
{
    struct io_uring_buf *buffer = &buffers->bufs[buffers->tail & (BUFFERS - 1)];
    buffer->addr = (unsigned long)pool[i];
    buffer->len = BUFFER_SIZE;
    buffer->bid = i;
    buffers->tail++;        /* the kernel looks only within io_uring_enter (DEFER_TASKRUN), so no barrier is needed */
}

static void set_up_buffers(void)
{
    buffers = map(-1, BUFFERS * sizeof *buffers->bufs, 0);
    struct io_uring_buf_reg registration = {
        .ring_addr = (unsigned long)buffers, .ring_entries = BUFFERS, .bgid = GROUP,
    };
    if (syscall(__NR_io_uring_register, ring, IORING_REGISTER_PBUF_RING, &registration, 1) < 0)
        err(1, "io_uring_register(PBUF_RING)");
    for (unsigned i = 0; i < BUFFERS; i++)
        give_back(i);
}

static void enter(unsigned wait_for)
{
    *sq_tail = tail;
    int consumed = syscall(__NR_io_uring_enter, ring, tail - submitted, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
    if (consumed >= 0)
        submitted += consumed;
    else if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
        err(1, "io_uring_enter");
}

static struct io_uring_sqe *prepare(unsigned operation, unsigned char opcode, int fd)
{
    while (tail - submitted > sq_mask)
        enter(0);
    struct io_uring_sqe *sqe = &sqes[tail++ & sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->fd = fd;
    sqe->user_data = (unsigned long long)operation << 32 | (unsigned)fd;
    return sqe;
}

static void arm_accept(int listener)
{
    prepare(ACCEPT, IORING_OP_ACCEPT, listener)->ioprio = IORING_ACCEPT_MULTISHOT;
}

static void arm_receive(int fd)
{
    struct io_uring_sqe *sqe = prepare(RECEIVE, IORING_OP_RECV, fd);
    sqe->ioprio = IORING_RECV_MULTISHOT;
    sqe->flags = IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
}

/* Where a send fails, the connection's receive ends, too: nothing depends on its completion. */
static void arm_send(int fd)
{
    struct io_uring_sqe *sqe = prepare(SEND, IORING_OP_SEND, fd);
    sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
    sqe->addr = (unsigned long)response;
    sqe->len = response_size;
    sqe->msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
}

static void on_accept(int listener, const struct io_uring_cqe *cqe)
{
    if (cqe->res >= 0)
        arm_receive(cqe->res);
    if (!(cqe->flags & IORING_CQE_F_MORE))
        arm_accept(listener);
}

static void on_receive(int fd, const struct io_uring_cqe *cqe)
{
    if (cqe->flags & IORING_CQE_F_BUFFER)
        give_back(cqe->flags >> IORING_CQE_BUFFER_SHIFT);
    if (cqe->res > 0)
        arm_send(fd);
    if (cqe->flags & IORING_CQE_F_MORE)
        return;
    if (cqe->res > 0 || cqe->res == -ENOBUFS)
        arm_receive(fd);
    else
        close(fd);
}

static int listen_on(int port)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);         /* what it accepts inherits this */
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096))
        err(1, "port %d", port);
    return listener;
}

int main(int count, char **arguments)
{
    FILE *file = count == 3 ? fopen(arguments[2], "rb") : NULL;
    if (!file || !(response_size = fread(response, 1, sizeof response, file)))
        errx(2, "usage: floor PORT FILE, where FILE has a response");
    set_up_ring();
    set_up_buffers();
    arm_accept(listen_on(atoi(arguments[1])));
    for (;;) {
        enter(1);
        for (; *cq_head != *cq_tail; ++*cq_head) {
            const struct io_uring_cqe *cqe = &cqes[*cq_head & cq_mask];
            int fd = (int)cqe->user_data;
            if (cqe->user_data >> 32 == RECEIVE)
                on_receive(fd, cqe);
            else if (cqe->user_data >> 32 == ACCEPT)
                on_accept(fd, cqe);
        }
    }
}
