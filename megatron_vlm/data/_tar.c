/* The walk of data/tar.py over tar headers, for archives without a fault: ustar, GNU long names and pax headers.
 *
 *     fd --pread: a window from header to header--> checks of each --> starts, offsets, sizes, groups, names
 *
 * What is odd in any way (damage, links, numbers written in rare ways, global headers ...) is not judged here: walk()
 * returns None, and the walk in Python reads the archive or names its fault. So both give the same answer by
 * construction, as long as this one is never the more generous of the two.
 *
 * The stable ABI of Python 3.11: one build serves later versions too.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 512, WINDOW = 1 << 16, MAX_EXTENSION = 1 << 15 };
/* Bytes read at once. Where headers lie closer than NEAR on average, copying what is between them costs less than a call for
 * each; else one is read, and the next with it if a small member follows: EXTENDED, if extension headers stand before each. */
enum { NEAR = 1 << 12, MANY = WINDOW, FEW = 1 << 11, EXTENDED = 7 << 9 };

typedef struct {
    char *data;
    size_t length, room;
} Buffer;

typedef struct {
    int fd;
    int64_t size, limit, low, high; /* the file's, the largest member, the window's */
    unsigned char *window;
    Buffer starts, offsets, sizes, groups, names;
    int64_t count;
    size_t key, key_length; /* of the last member, in names */
    char long_name[MAX_EXTENSION];
    size_t long_length;
} Walk;

enum { FINE, ODD, NO_MEMORY, AGAIN }; /* what a step comes to */

static int append(Buffer *to, const void *data, size_t length) {
    if (!length)
        return FINE;
    if (to->room - to->length < length) {
        size_t room = to->room ? to->room : 4096;
        while (room - to->length < length)
            room *= 2;
        char *grown = realloc(to->data, room);
        if (!grown)
            return NO_MEMORY;
        to->data = grown;
        to->room = room;
    }
    memcpy(to->data + to->length, data, length);
    to->length += length;
    return FINE;
}

static int append_number(Buffer *to, int64_t value) {
    return append(to, &value, sizeof value);
}

/* Returns the `length` bytes (at most WINDOW) at `at`, valid until the next call; NULL where the file lacks them. */
static const unsigned char *view(Walk *walk, int64_t at, int64_t length, int64_t ahead) {
    if (at < 0 || length > walk->size - at)
        return NULL;
    if (at < walk->low || at + length > walk->high) {
        int64_t want = length > ahead ? length : ahead, got = 0;
        if (want > walk->size - at)
            want = walk->size - at;
        while (got < length) {
            ssize_t more = pread(walk->fd, walk->window + got, (size_t)(want - got), (off_t)(at + got));
            if (more < 0 && errno == EINTR)
                continue;
            if (more <= 0)
                return NULL;
            got += more;
        }
        walk->low = at;
        walk->high = at + got;
    }
    return walk->window + (at - walk->low);
}

/* Returns a number of exactly `digits` octal digits, or -1. */
static int64_t octal(const unsigned char *field, int digits) {
    int64_t value = 0;
    for (int i = 0; i < digits; i++) {
        if (field[i] < '0' || field[i] > '7')
            return -1;
        value = value * 8 + (field[i] - '0');
    }
    return value;
}

/* Returns the number that a field of digits, then blanks or NULs, holds; -1 where it is written in another way. */
static int64_t padded_octal(const unsigned char *field, int length) {
    int digits = 0;
    while (digits < length && field[digits] >= '0' && field[digits] <= '7')
        digits++;
    for (int i = digits; i < length; i++)
        if (field[i] && field[i] != ' ')
            return -1;
    return digits ? octal(field, digits) : -1;
}

/* Whether any reader takes the field for a number: blanks, octal digits, blanks or NULs. */
static int is_plain(const unsigned char *field, int length) {
    int i = 0;
    while (i < length && field[i] == ' ')
        i++;
    while (i < length && field[i] >= '0' && field[i] <= '7')
        i++;
    while (i < length && (field[i] == ' ' || field[i] == 0))
        i++;
    return i == length;
}

/* The sum of a header's bytes, those of the checksum's own field taken as blanks: four bytes of each word at a time. */
static int64_t sum_of(const unsigned char *block) {
    const uint64_t low = 0x00FF00FF00FF00FFu;
    uint64_t lanes = 0, word;
    for (int i = 0; i < BLOCK; i += 8) {
        memcpy(&word, block + i, 8);
        lanes += (word & low) + ((word >> 8) & low);
    }
    int64_t sum = (int64_t)((lanes & 0xFFFF) + (lanes >> 16 & 0xFFFF) + (lanes >> 32 & 0xFFFF) + (lanes >> 48));
    for (int i = 148; i < 156; i++)
        sum += ' ' - block[i];
    return sum;
}

/* Whether `length` (at most BLOCK) bytes are all zero. */
static int is_zero(const unsigned char *data, size_t length) {
    static const unsigned char zeros[BLOCK];
    return !memcmp(data, zeros, length);
}

static int keep_long_name(Walk *walk, const unsigned char *name, size_t length) {
    if (walk->long_length || !length || name[length - 1] == '/' || memchr(name, 0, length))
        return ODD;
    memcpy(walk->long_name, name, length);
    walk->long_length = length;
    return FINE;
}

/* Reads the records "LENGTH KEY=VALUE\n" of a pax header: the path; what would move the member is odd. */
static int read_pax(Walk *walk, const unsigned char *data, size_t length) {
    size_t at = 0;
    while (at < length) {
        size_t record = 0, i = at;
        while (i < length && i - at < 7 && data[i] >= '0' && data[i] <= '9')
            record = record * 10 + (data[i++] - '0');
        if (i == at || data[at] == '0' || i >= length || data[i] != ' ' || record > length - at)
            return ODD;
        size_t key = i + 1, end = at + record - 1;
        if (end <= key || data[end] != '\n')
            return ODD;
        const unsigned char *equals = memchr(data + key, '=', end - key);
        if (!equals || equals == data + key)
            return ODD;
        size_t key_length = (size_t)(equals - data) - key, value = key + key_length + 1;
        const char *word = (const char *)data + key;
        if ((key_length == 4 && !memcmp(word, "size", 4)) || (key_length >= 4 && !memcmp(word, "GNU.", 4)) ||
            (key_length == 10 && !memcmp(word, "hdrcharset", 10)))
            return ODD;
        if (key_length == 4 && !memcmp(word, "path", 4)) {
            int result = keep_long_name(walk, data + value, end - value);
            if (result != FINE)
                return result;
        }
        at += record;
    }
    return FINE;
}

static int read_extension(Walk *walk, unsigned char kind, int64_t at, int64_t size) {
    if (size < 1 || size > MAX_EXTENSION)
        return ODD;
    int64_t padded = (size + BLOCK - 1) & -BLOCK;
    const unsigned char *data = view(walk, at, padded, MANY);
    if (!data || !is_zero(data + size, (size_t)(padded - size)))
        return ODD;
    if (kind == 'x')
        return read_pax(walk, data, (size_t)size);
    if (kind != 'L' || data[size - 1])
        return ODD;
    return keep_long_name(walk, data, strnlen((const char *)data, (size_t)size));
}

static int add_member(Walk *walk, const unsigned char *block, int64_t start, int64_t offset, int64_t size) {
    Buffer *names = &walk->names;
    size_t first = names->length, length = strnlen((const char *)block, 100), failed = 0;
    if (!is_zero(block + length, 100 - length) || (block[345] && block[262]) ||
        (!block[156] && length && block[length - 1] == '/'))
        return ODD;
    if (walk->long_length) {
        failed |= append(names, walk->long_name, walk->long_length);
    } else {
        if (block[345]) { /* ustar's field for the folder */
            failed |= append(names, block + 345, strnlen((const char *)block + 345, 155));
            failed |= append(names, "/", 1);
        }
        failed |= append(names, block, length);
    }
    failed |= append(names, "", 1);
    if (failed)
        return NO_MEMORY;
    /* webdataset's key: up to the first dot after the last slash. */
    const char *name = names->data + first, *tail = strrchr(name, '/'), *dot = strchr(tail ? tail : name, '.');
    size_t key_length = dot ? (size_t)(dot - name) + 1 : names->length - first;
    if (!walk->count || key_length != walk->key_length || memcmp(name, names->data + walk->key, key_length))
        failed |= append_number(&walk->groups, walk->count);
    walk->key = first;
    walk->key_length = key_length;
    walk->count++;
    failed |= append_number(&walk->starts, start) | append_number(&walk->offsets, offset);
    failed |= append_number(&walk->sizes, size);
    return failed ? NO_MEMORY : FINE;
}

static int run(Walk *walk, int64_t *end, int extended) {
    int64_t at = 0, step = NEAR; /* step: from header to header, a running mean */
    int64_t start = -1;          /* of an extension header that waits for its member */
    for (;;) {
        const unsigned char *block = view(walk, at, BLOCK, step <= NEAR ? MANY : extended ? EXTENDED : FEW);
        if (!block)
            return ODD;
        if (!block[0] && is_zero(block, BLOCK)) {
            *end = at;
            return start < 0 ? FINE : ODD;
        }
        int64_t size = octal(block + 124, 11);
        unsigned char kind = block[156];
        if (size < 0 || size > walk->limit || padded_octal(block + 148, 8) != sum_of(block))
            return ODD;
        int64_t next = at + BLOCK + ((size + BLOCK - 1) & -BLOCK);
        if (extended && !(is_plain(block + 100, 8) && is_plain(block + 108, 8) && is_plain(block + 116, 8) &&
                          (block[135] == 0 || block[135] == ' ') && is_plain(block + 136, 12) && is_plain(block + 329, 8) && is_plain(block + 337, 8)))
            return ODD; /* an archive with extension headers goes through tarfile there, which reads all numbers */
        if (kind == 'x' || kind == 'L') {
            if (!extended)
                return AGAIN;
            if (start >= 0)
                return ODD;
            int result = read_extension(walk, kind, at + BLOCK, size);
            if (result != FINE)
                return result;
            start = at;
        } else if (kind == 0 || kind == '0') {
            int result = add_member(walk, block, start < 0 ? at : start, at + BLOCK, size);
            if (result != FINE)
                return result;
            start = -1;
            walk->long_length = 0;
        } else if (kind == '5' && size == 0) {
            start = -1;
            walk->long_length = 0;
        } else {
            return ODD;
        }
        step += (next - at - step) / 8;
        at = next;
    }
}

static PyObject *as_bytes(const Buffer *buffer) {
    return PyBytes_FromStringAndSize(buffer->data, (Py_ssize_t)buffer->length);
}

static PyObject *tar_walk(PyObject *self, PyObject *args) {
    int fd, result = NO_MEMORY;
    long long size, limit;
    (void)self;
    if (!PyArg_ParseTuple(args, "iLL:walk", &fd, &size, &limit))
        return NULL;
    Walk *walk = calloc(1, sizeof *walk);
    unsigned char *window = malloc(WINDOW);
    int64_t end = 0;
    PyObject *made = NULL;
    if (walk && window) {
        walk->fd = fd;
        walk->size = size;
        walk->limit = limit;
        walk->window = window;
        PyThreadState *state = PyEval_SaveThread();
        result = run(walk, &end, 0);
        if (result == AGAIN) {
            walk->starts.length = walk->offsets.length = walk->sizes.length = 0;
            walk->groups.length = walk->names.length = 0;
            walk->count = 0;
            result = run(walk, &end, 1);
        }
        PyEval_RestoreThread(state);
    }
    if (result == NO_MEMORY)
        PyErr_NoMemory();
    else if (result == ODD)
        made = Py_NewRef(Py_None);
    else
        made = Py_BuildValue("NNNNNL", as_bytes(&walk->starts), as_bytes(&walk->offsets), as_bytes(&walk->sizes),
                             as_bytes(&walk->groups), as_bytes(&walk->names), (long long)end);
    if (walk) {
        free(walk->starts.data);
        free(walk->offsets.data);
        free(walk->sizes.data);
        free(walk->groups.data);
        free(walk->names.data);
    }
    free(window);
    free(walk);
    return made;
}

static PyMethodDef methods[] = {
    {"walk", tar_walk, METH_VARARGS,
     "walk(fd, size, limit) -> (starts, offsets, sizes, groups: int64 as bytes, names ended by NUL, end), or None: odd."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_tar", .m_doc = "The fast walk over tar headers.", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__tar(void) {
    return PyModuleDef_Init(&module);
}
