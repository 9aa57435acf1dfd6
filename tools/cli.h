/* cli.h - what a command-line program needs besides the library: options from a table, strings that grow, files. */
#ifndef QWEN3_CLI_H
#define QWEN3_CLI_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
  #include <io.h>
  #define CLI_IS_TERMINAL(stream) _isatty(_fileno(stream))
#else
  #include <unistd.h>
  #define CLI_IS_TERMINAL(stream) isatty((stream) == stdin ? 0 : (stream) == stdout ? 1 : 2)
#endif

static void cli_die(int status, const char *what, const char *detail) {
    fprintf(stderr, "example: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(status);
}

/* ---- options ------------------------------------------------------------------------------------------------- */
typedef struct cli_option {
    const char *name, *value;           /* value: what follows it, NULL: nothing */
    double      low, high;              /* high > 0: that is a number between these */
    const char *help;
} cli_option;

static void cli_help(FILE *f, const cli_option *options, int n, const char *head, const char *tail) {
    int i;
    fputs(head, f);
    for (i = 0; i < n; i++)
        fprintf(f, "  %-14s %-4s %s\n", options[i].name, options[i].value ? options[i].value : "", options[i].help);
    fputs(tail, f);
}

/* text[i] becomes what was given after option i ("" if nothing follows it, NULL if it was not given), number[i] its
   value. The last option is for help. Returns the one argument that is no option; leaves on wrong usage. */
static const char *cli_parse(int argc, char **argv, const cli_option *options, int n, const char **text, double *number,
                             const char *head, const char *tail) {
    const char *argument = NULL;
    char *end;
    int i, o;
    for (i = 1; i < argc; i++) {
        for (o = 0; o < n && strcmp(options[o].name, argv[i]) != 0; o++) { }
        if (strcmp(argv[i], "-h") == 0) o = n - 1;
        if (o == n && (argv[i][0] == '-' || argument)) cli_die(2, "unknown argument (see --help)", argv[i]);
        if (o == n) { argument = argv[i]; continue; }
        if (options[o].value && i + 1 == argc) cli_die(2, "missing value after", argv[i]);
        text[o] = options[o].value ? argv[++i] : "";
        if (options[o].high <= 0) continue;
        number[o] = strtod(text[o], &end);
        if (end == text[o] || *end || !(number[o] >= options[o].low && number[o] <= options[o].high))
            cli_die(2, "bad value after", options[o].name);
    }
    if (!text[n - 1] && argument) return argument;
    cli_help(text[n - 1] ? stdout : stderr, options, n, head, tail);
    exit(text[n - 1] ? 0 : 2);
}

/* ---- strings that grow, and files ------------------------------------------------------------------------------ */
typedef struct cli_string { char *bytes; size_t n, cap; } cli_string;

static void cli_append(cli_string *s, const char *bytes, size_t n) {
    if (s->n + n + 1 > s->cap) {
        s->cap = (s->n + n + 1) * 2;
        s->bytes = (char *)realloc(s->bytes, s->cap);
        if (!s->bytes) cli_die(3, "out of memory", NULL);
    }
    memcpy(s->bytes + s->n, bytes, n);
    s->n += n;
    s->bytes[s->n] = '\0';
}

#define CLI_ALL ((size_t)-1)

/* The next n bytes of a file, or fewer at its end. */
static cli_string cli_read(FILE *f, size_t n) {
    cli_string s = {NULL, 0, 0};
    char part[65536];
    size_t got = 1;
    cli_append(&s, "", 0);
    while (s.n < n && got > 0) {
        got = fread(part, 1, n - s.n < sizeof part ? n - s.n : sizeof part, f);
        cli_append(&s, part, got);
    }
    return s;
}

/* A line without its end; empty at the end of the file. */
static cli_string cli_read_line(FILE *f) {
    cli_string s = {NULL, 0, 0};
    int next;
    cli_append(&s, "", 0);
    while ((next = getc(f)) != EOF && next != '\n') { char c = (char)next; cli_append(&s, &c, 1); }
    if (s.n > 0 && s.bytes[s.n - 1] == '\r') s.bytes[--s.n] = '\0';
    return s;
}

/* A whole file as a string; NULL if it cannot be read. */
static char *cli_read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    cli_string s = {NULL, 0, 0};
    if (f) { s = cli_read(f, CLI_ALL); fclose(f); }
    return s.bytes;
}

/* A bar on the terminal's line, which it leaves empty at the end; done 0..1 */
static void cli_progress(const char *what, double done) {
    static const char bar[] = "##############################..............................";
    fprintf(stderr, "\r%s [%.30s] %3d %%", what, bar + 30 - (int)(done * 30), (int)(done * 100));
    if (done >= 1) fputs("\r\033[K", stderr);
}
#endif
