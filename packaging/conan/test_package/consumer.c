/* A program that finds the library as a package: loads a model, or without one says that there is none. */
#include <qwen3.h>
#include <stdio.h>

int main(int argc, char **argv) {
    static qwen3_load_desc load;
    qwen3_model *model;
    char err[256];
    qwen3_result r;
    load.path = argc > 1 ? argv[1] : "no/such/model";
    r = qwen3_load(&model, &load, err, sizeof err);
    printf("version %d, compiled for %d: %s\n", qwen3_version(), QWEN3_VERSION, r == QWEN3_OK ? "loaded" : err);
    qwen3_free(model);
    return argc > 1 ? r != QWEN3_OK : r != QWEN3_ERR_IO;
}
