#!/bin/sh
# download.sh - fetch a model from the Hugging Face hub, checked file by file.
#
#   tools/download.sh [-f FILE.gguf] MODEL [DEST]
#
#   MODEL   owner/name on the hub, for example Qwen/Qwen3-0.6B
#   DEST    target directory (default: models/<name>)
#   -f      this file of the model, and not the directory: with its other parts if it is
#           the first of several (NAME-00001-of-00003.gguf)
#
# A file gets its final name only after its size and hash have matched what the
# hub lists, so whatever is in DEST under a final name is whole.  Until then it
# is NAME.part, and the next run resumes it.  DEST mirrors the hub: a file there
# whose content differs is replaced.
#
# Environment:
#   HF_ENDPOINT            the hub, or a mirror of it (https://huggingface.co)
#   HF_TOKEN               access token, for gated and private models
#   DOWNLOAD_RETRY_DELAY   seconds before the first retry; doubles with each
#                          further one, up to a minute (2; 0 never waits)
#
# Exit status: 0 when every file is there and checked, 1 on any failure.
# Needs: a POSIX shell, curl, awk, and sha256sum + sha1sum or shasum.

set -u
LC_ALL=C        # a-z means ASCII, and awk counts bytes
export LC_ALL

max_tries=5             # per file, counted afresh whenever real progress was made
progress_step=1048576   # ... which is this many bytes more than ever before
slack=1048576           # bytes beyond a file's size, as the bodies of redirects count
max_answer=4194304      # bytes of an answer that is no file; a model's has some thousand
max_time=120            # seconds for that

# --- messages -----------------------------------------------------------------

say()  { printf '%s\n' "$*"; }
warn() { printf 'download.sh: %s\n' "$*" >&2; }
die()  { warn "$*"; exit 1; }

human_size() {
    awk -v n="$1" 'BEGIN {
        if      (n >= 1e9) printf "%.2f GB\n", n / 1e9
        else if (n >= 1e6) printf "%.1f MB\n", n / 1e6
        else if (n >= 1e3) printf "%.1f kB\n", n / 1e3
        else               printf "%d bytes\n", n
    }'
}

# --- files --------------------------------------------------------------------

# Anything but a readable regular file has size 0.
file_size() {
    if [ -f "$1" ] && [ -r "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# sha 1|256: the hex digest of stdin.
sha() {
    if command -v "sha${1}sum" >/dev/null; then "sha${1}sum"; else shasum -a "$1"; fi |
        awk '{ print $1 }'
}

# The hub names a large (LFS) file by the SHA-256 of its content, and a small one
# by its git blob id: the SHA-1 of a short header and the content.
file_hash() {
    case $bits in
        256) sha 256 <"$1" ;;
        1)   { printf 'blob %s\0' "$size"; cat "$1"; } | sha 1 ;;
    esac
}

# is_whole FILE: does it have the listed size and hash?  If not, $problem says why.
is_whole() {
    actual=$(file_size "$1")
    if [ "$actual" -ne "$size" ]; then
        problem="wrong size ($actual bytes instead of $size)"
        return 1
    fi
    actual=$(file_hash "$1")
    if [ "$actual" != "$hash" ]; then
        problem="wrong SHA-$bits (${actual:-none} instead of $hash)"
        return 1
    fi
}

# --- HTTP ---------------------------------------------------------------------

# curl reads the token from stdin, as an argument would show up in ps.  It is set
# as a bearer token and not as a header of our own, because curl keeps a bearer
# token from other hosts when it follows a redirect.
token_config() {
    [ -z "$token" ] || printf 'oauth2-bearer = "%s"\n' "$token"
}

# request URL [CURL-OPTION...]: sets $body, $status (HTTP) and $code (curl).
# -q comes first: a personal .curlrc must not change what arrives here.  Older curls
# limit only sizes that are announced, so that head and ulimit end what is endless.
request() {
    url=$1
    shift
    reply=$({
        ulimit -f $((file_limit / 512))
        token_config | curl -q -K - --fail --globoff --location --max-redirs 10 \
            --proto '=http,https' --proto-redir "$redirect_protocols" \
            --connect-timeout 30 --speed-limit 1000 --speed-time 60 \
            --write-out '\n%{http_code}' "$@" --url "$url"
        printf '\n%s' $?
    } | head -c "$max_answer")
    code=$(printf '%s\n' "$reply" | tail -n 1)
    status=$(printf '%s\n' "$reply" | tail -n 2 | head -n 1)
    body=$(printf '%s\n' "$reply" | sed -e '$d' | sed -e '$d')
}

# try URL [CURL-OPTION...]: one request.  Returns 0 when it went well, 1 when it
# is worth trying again, 2 when that must be without resuming ($reason says why);
# whatever another try would not mend ends the script.
try() {
    request "$@"
    case $code in
        0)  return 0 ;;
        5|6) reason="cannot resolve the host name" ;;
        7)  reason="cannot connect" ;;
        18) reason="the connection was cut" ;;
        28) reason="the connection timed out" ;;
        16|35|52|55|56|92|95) reason="the connection broke (curl error $code)" ;;
        22) try_again_after_http_error ; return ;;
        33|36) reason="the server cannot resume"; return 2 ;;
        23|153)
            [ "$(file_size "$part")" -lt "$file_limit" ] || die "$url sends more than the listed $size bytes"
            die "cannot write $part: disk full, or no permission" ;;
        60) die "the certificate of $url cannot be trusted" ;;
        63) die "$url sends more than the listed $size bytes" ;;
        [1-9]|[1-9][0-9]|[1-9][0-9][0-9]) die "$url: curl error $code" ;;
        *)  die "$url: the answer has more than $max_answer bytes" ;;
    esac
    return 1
}

try_again_after_http_error() {
    reason="HTTP $status"
    case $status in
        408|429|5??) return 1 ;;
        416) return 2 ;;        # the .part does not fit the server's file
        404) die "not found (HTTP 404): $url; is $model the right name?" ;;
        401|403) die "access denied (HTTP $status): $url; $(access_hint)" ;;
        *) die "HTTP $status: $url" ;;
    esac
}

# The hub answers 401 for a model that does not exist, too.
access_hint() {
    if [ -n "$token" ]; then
        echo "check the model's name, and that the owner of HF_TOKEN may read it"
    else
        echo "check the model's name; if it is gated or private, set HF_TOKEN"
    fi
}

# back_off: wait before another try of $url, or give up.
back_off() {
    [ "$tries" -lt "$max_tries" ] || die "$url: $reason; gave up after $tries tries"
    warn "$url: $reason; trying again in $delay s"
    [ "$delay" -eq 0 ] || sleep "$delay"
    delay=$((delay * 2))
    [ "$delay" -le 60 ] || delay=60
}

# api PATH: sets $body to the hub's answer.
api() {
    tries=1
    delay=$first_delay
    until try "$endpoint/api/models/$1" --silent --max-time "$max_time"; do
        back_off
        tries=$((tries + 1))
    done
}

# --- the list of files --------------------------------------------------------

# JSON to lines "key.key.key<TAB>value", array elements keyed 0, 1, 2...  Strings
# stay as written, escapes included.  With the quote as record separator, text
# alternates between structure and string; a quote after an odd number of
# backslashes does not end its string.
flatten_json() {
    awk '
        function emit(value,    path, d) {
            path = key[1]
            for (d = 2; d <= depth; d++) path = path "." key[d]
            print path "\t" value
        }
        function structure(text,    i, c, word) {
            for (i = 1; i <= length(text); i++) {
                c = substr(text, i, 1)
                if (c ~ /[-+.0-9A-Za-z]/) { word = word c; continue }
                if (word != "") { emit(word); word = "" }
                if      (c == "{") { kind[++depth] = c; key[depth] = ""; at_key = 1 }
                else if (c == "[") { kind[++depth] = c; key[depth] = 0;  at_key = 0 }
                else if (c == "}" || c == "]") depth--
                else if (c == ":") at_key = 0
                else if (c == ",") {
                    at_key = kind[depth] == "{"
                    if (!at_key) key[depth]++
                }
                started = started || depth > 0
                if (depth > 20) exit            # no listing; and this text has its limits
            }
        }
        function string(text) { if (at_key) key[depth] = text; else emit(text) }

        BEGIN { RS = "\"" }
        !in_string { structure($0); in_string = 1; text = ""; next }
        {
            text = text $0
            backslashes = match($0, /\\+$/) ? RLENGTH : 0
            if (backslashes % 2) { text = text RS; next }
            string(text)
            in_string = 0
        }
        END { exit (!started || depth != 0) }
    '
}

# Flat listing in, one line "NAME SIZE 256|1 HASH" per file to download out.  On
# failure the output is the error message.  Names come from the server: none but
# plain ones are looked at, and of these only the ones known here are taken.
select_files() {
    awk -F '\t' -v wanted="$file" '
        function fail(message) { print message; failed = 1; exit 1 }
        function take(name) {
            if (!(name in size)) return 0
            if (size[name] !~ /^[1-9][0-9]*$/ || length(size[name]) > 15 ||
                hash[name] !~ /^[0-9a-f]+$/ || length(hash[name]) != (bits[name] == 256 ? 64 : 40))
                fail("the hub lists no usable size and hash for " name)
            rows = rows name " " size[name] " " bits[name] " " hash[name] "\n"
            return 1
        }
        function need(name) {
            if (take(name)) return
            if (ggufs != "") ggufs = "; FILE=NAME (make download) or -f NAME takes one of its GGUF files:" ggufs
            fail("the hub has no " name " for this model" ggufs)
        }
        function keep(i,    name) {
            name = field[i, "path"]
            if (name !~ /^[A-Za-z0-9._][A-Za-z0-9._-]*$/ || name ~ /\.\./) {
                gsub(/[^A-Za-z0-9._\/-]/, "?", name)    # no escapes to the terminal
                print "download.sh: skipping a file with an unsafe name: " name > "/dev/stderr"
                return
            }
            size[name] = field[i, "size"]
            bits[name] = (i, "lfs.oid") in field ? 256 : 1
            hash[name] = bits[name] == 256 ? field[i, "lfs.oid"] : field[i, "oid"]
            if (name ~ /^model-[0-9]+-of-[0-9]+\.safetensors$/) {
                split(name, part, /[-.]/)
                shards = part[4] + 0
            }
            if (name ~ /\.gguf$/ && (name !~ /-[0-9]+-of-[0-9]+\.gguf$/ || name ~ /-00001-of-/) && ++n_ggufs <= 50)
                ggufs = ggufs "\n    " name
        }

        $1 !~ /^[0-9][0-9]?[0-9]?[0-9]?[.]/ { fail("the answer is not a list of files, or one of more than 9999") }
        {
            i = $1 + 0
            field[i, substr($1, index($1, ".") + 1)] = $2
            if (i >= entries) entries = i + 1
        }
        END {
            if (failed) exit 1
            for (i = 0; i < entries; i++) if (field[i, "type"] == "file") keep(i)

            if (wanted != "") {
                need(wanted)
                parts = wanted ~ /-00001-of-[0-9]+\.gguf$/ ? substr(wanted, length(wanted) - 9, 5) + 0 : 1
                stem = substr(wanted, 1, length(wanted) - length("-00001-of-00001.gguf"))
                for (i = 2; i <= parts; i++) need(sprintf("%s-%05d-of-%05d.gguf", stem, i, parts))
                printf "%s", rows
                exit
            }
            need("config.json")
            take("generation_config.json")
            if (!take("tokenizer.json")) { need("vocab.json"); need("merges.txt") }
            take("tokenizer_config.json")
            take("chat_template.jinja")
            if (!take("model.safetensors")) {
                if (!shards) fail("the hub has no safetensors weights for this model")
                need("model.safetensors.index.json")
                for (i = 1; i <= shards; i++)
                    need(sprintf("model-%05d-of-%05d.safetensors", i, shards))
            }
            printf "%s", rows
        }
    '
}

# "main" may move while we download.  Listing and files are asked for by commit,
# so that they always belong together.
resolve_revision() {
    api "$model"
    revision=$(printf '%s\n' "$body" | flatten_json | awk -F '\t' '$1 == "sha" { print $2; exit }')
    case $revision in
        ''|*[!0-9a-f]*) die "$url: the answer names no commit; is $endpoint a model hub?" ;;
    esac
}

list_files() {
    api "$model/tree/$revision?recursive=false"
    flat=$(printf '%s\n' "$body" | flatten_json) || die "$url: the answer is not a list of files"
    plan=$(printf '%s\n' "$flat" | select_files) || die "$model: $plan"
}

# --- downloading --------------------------------------------------------------

# Fetches the rest of $part.  Whether the result is any good is not judged here.
fetch_part() {
    [ "$(file_size "$part")" -le "$size" ] || remove "$part"
    tries=1
    delay=$first_delay
    best=$(file_size "$part")
    file_limit=$(((size + slack) / 512 * 512))
    until [ "$(file_size "$part")" -eq "$size" ]; do
        try "$endpoint/$model/resolve/$revision/$name" "$progress" \
            --max-filesize "$file_limit" --continue-at - --output "$part"
        case $? in
            0) return ;;
            2) remove "$part" ;;
        esac
        count_try
        back_off
        tries=$((tries + 1))
    done
}

# A bad line may be cut any number of times, as long as every few tries get
# further than all before; that bounds the tries by the size of the file.
count_try() {
    now=$(file_size "$part")
    if [ "$now" -ge $((best + progress_step)) ]; then
        best=$now
        tries=1
        delay=$first_delay
    fi
}

remove() {
    rm -f "$1" 2>/dev/null || die "cannot remove $1"
}

announce() {
    done_size=$(file_size "$part")
    if [ "$done_size" -gt 0 ]; then
        say "$name: resuming at $(human_size "$done_size") of $(human_size "$size")"
    else
        say "$name: downloading $(human_size "$size")"
    fi
}

# A wrong hash may come from an old .part, so it gets one try from scratch.
get_file() {
    final=$dest/$name
    part=$final.part
    if [ -e "$final" ]; then
        if is_whole "$final"; then
            say "$name: already there, checked"
            return
        fi
        say "$name: the one in $dest has the $problem"
        remove "$final"
    fi
    for again in yes no; do
        announce
        fetch_part
        if is_whole "$part"; then
            mv -f "$part" "$final" || die "cannot rename $part"
            say "$name: checked"
            return
        fi
        remove "$part"
        [ $again = no ] || warn "$name: $problem; starting over"
    done
    die "$name: $problem, again; what the server sends is not what the hub lists"
}

# Fails early rather than at the end of a long download.  Files that have their
# full size are taken as there.
check_room() {
    missing=0
    while read -r name size _; do
        if [ "$(file_size "$dest/$name")" -ne "$size" ]; then
            missing=$((missing + size - $(file_size "$dest/$name.part")))
        fi
    done <<END
$plan
END
    # Matched by shape, since the name of a file system may contain spaces.
    room=$(df -Pk "$dest" 2>/dev/null | awk 'match($0, / [0-9]+ +[0-9]+ +[0-9]+ +[0-9]+%/) {
        split(substr($0, RSTART, RLENGTH), column, " ")
        print column[3]
    }')
    [ -n "$room" ] || return 0      # unknown: curl will find out
    [ $((missing / 1024)) -le "$room" ] || die "not enough room in $dest:" \
        "$(human_size "$missing") to download, $(human_size $((room * 1024))) free"
}

# Two downloads that append to the same .part could spoil a file after its check.
lock_dest() {
    mkdir -p "$dest" 2>/dev/null || die "cannot create the directory $dest"
    lock=$dest/.download.lock
    if mkdir "$lock" 2>/dev/null; then
        trap 'rmdir "$lock"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
    elif [ -d "$lock" ]; then
        die "another download into $dest is running; if not, remove it with: rmdir $lock"
    else
        die "cannot write to the directory $dest"
    fi
}

# --- settings -----------------------------------------------------------------

read_arguments() {
    file=
    if [ "${1:-}" = -f ]; then
        file=${2:-}
        case $file in
            *[!A-Za-z0-9._-]*|[!A-Za-z0-9]*|*..*) file= ;;
            *.gguf) ;;
            *) file= ;;
        esac
        [ -n "$file" ] || die "'${2:-}' is not the name of a .gguf file"
        shift 2
    fi
    if [ $# -lt 1 ] || [ $# -gt 2 ]; then
        die "usage: tools/download.sh [-f FILE.gguf] MODEL [DEST], for example: tools/download.sh Qwen/Qwen3-0.6B"
    fi
    model=$1
    case $model in
        */*/*|*[!A-Za-z0-9._/-]*|[!A-Za-z0-9]*|*/[!A-Za-z0-9]*|*/) model= ;;
        */*) ;;
        *) model= ;;
    esac
    [ -n "$model" ] || die "'$1' is not a model name of the form owner/name"
    dest=${2:-models/${model#*/}}
    case $dest in
        -*) dest=./$dest ;;     # never an option of some tool
    esac
}

read_environment() {
    endpoint=${HF_ENDPOINT:-https://huggingface.co}
    endpoint=${endpoint%/}
    case $endpoint in
        *[!]A-Za-z0-9._~:/%[-]*) die "HF_ENDPOINT is not a plain URL: $endpoint" ;;
        https://?*) redirect_protocols='=https' ;;
        http://?*) redirect_protocols='=http,https' ;;
        *) die "HF_ENDPOINT must start with https:// or http://: $endpoint" ;;
    esac

    token=${HF_TOKEN:-}
    case $token in
        *[!A-Za-z0-9._~+/=-]*) die "HF_TOKEN has a character that no token has (a space, a line end?)" ;;
    esac

    file_limit=$max_answer

    first_delay=${DOWNLOAD_RETRY_DELAY:-2}
    case $first_delay in
        *[!0-9]*|0?*|????*) die "DOWNLOAD_RETRY_DELAY must be a small whole number of seconds: $first_delay" ;;
    esac

    # Without a terminal curl stays silent: try() tells what went wrong.  (With
    # one it adds a line of its own, as --silent would silence the bar, too.)
    if [ -t 2 ]; then progress=--progress-bar; else progress=--silent; fi
}

check_tools() {
    for tool in curl awk; do
        command -v $tool >/dev/null || die "$tool is needed, but not installed"
    done
    command -v shasum >/dev/null ||
        { command -v sha256sum >/dev/null && command -v sha1sum >/dev/null; } ||
        die "sha256sum and sha1sum, or shasum, are needed, but not installed"
}

# ------------------------------------------------------------------------------

main() {
    check_tools
    read_arguments "$@"
    read_environment

    resolve_revision
    list_files
    lock_dest
    check_room

    say "$model, revision $revision, into $dest"
    while read -r name size bits hash; do
        get_file
    done <<END
$plan
END
    say "All files are there. Next: make run MODEL=$dest${file:+/$file}"
}

main "$@"
