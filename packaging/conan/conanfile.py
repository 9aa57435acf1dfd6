import os

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy

required_conan_version = ">=2.0"


class Qwen3Conan(ConanFile):
    name = "qwen3"
    version = "1.0.0"
    license = "MIT OR Unlicense"
    description = "Runs Qwen3 language models: one C header without dependencies"
    topics = ("llm", "qwen3", "inference", "single-header")
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False], "fPIC": [True, False]}
    default_options = {"shared": False, "fPIC": True}
    implements = ["auto_shared_fpic"]
    languages = "C"

    def export_sources(self):
        root = os.path.join(self.recipe_folder, "..", "..")
        for name in "CMakeLists.txt", "qwen3.h", "qwen3_cuda.cu", "LICENSE", "packaging/*.cmake":
            copy(self, name, root, self.export_sources_folder)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        CMakeToolchain(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        CMake(self).install()

    def package_info(self):
        self.cpp_info.libs = ["qwen3"]
        self.cpp_info.set_property("cmake_target_name", "qwen3::qwen3")
        if self.settings.os != "Windows":
            self.cpp_info.system_libs = ["m", "pthread"]
