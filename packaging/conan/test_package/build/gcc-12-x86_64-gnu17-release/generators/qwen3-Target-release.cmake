# Avoid multiple calls to find_package to append duplicated properties to the targets
include_guard()########### VARIABLES #######################################################################
#############################################################################################
set(qwen3_FRAMEWORKS_FOUND_RELEASE "") # Will be filled later
conan_find_apple_frameworks(qwen3_FRAMEWORKS_FOUND_RELEASE "${qwen3_FRAMEWORKS_RELEASE}" "${qwen3_FRAMEWORK_DIRS_RELEASE}")

set(qwen3_LIBRARIES_TARGETS "") # Will be filled later


######## Create an interface target to contain all the dependencies (frameworks, system and conan deps)
if(NOT TARGET qwen3_DEPS_TARGET)
    add_library(qwen3_DEPS_TARGET INTERFACE IMPORTED)
endif()

set_property(TARGET qwen3_DEPS_TARGET
             APPEND PROPERTY INTERFACE_LINK_LIBRARIES
             $<$<CONFIG:Release>:${qwen3_FRAMEWORKS_FOUND_RELEASE}>
             $<$<CONFIG:Release>:${qwen3_SYSTEM_LIBS_RELEASE}>
             $<$<CONFIG:Release>:>)

####### Find the libraries declared in cpp_info.libs, create an IMPORTED target for each one and link the
####### qwen3_DEPS_TARGET to all of them
conan_package_library_targets("${qwen3_LIBS_RELEASE}"    # libraries
                              "${qwen3_LIB_DIRS_RELEASE}" # package_libdir
                              "${qwen3_BIN_DIRS_RELEASE}" # package_bindir
                              "${qwen3_LIBRARY_TYPE_RELEASE}"
                              "${qwen3_IS_HOST_WINDOWS_RELEASE}"
                              qwen3_DEPS_TARGET
                              qwen3_LIBRARIES_TARGETS  # out_libraries_targets
                              "_RELEASE"
                              "qwen3"    # package_name
                              "${qwen3_NO_SONAME_MODE_RELEASE}")  # soname

# FIXME: What is the result of this for multi-config? All configs adding themselves to path?
set(CMAKE_MODULE_PATH ${qwen3_BUILD_DIRS_RELEASE} ${CMAKE_MODULE_PATH})

########## GLOBAL TARGET PROPERTIES Release ########################################
    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_LINK_LIBRARIES
                 $<$<CONFIG:Release>:${qwen3_OBJECTS_RELEASE}>
                 $<$<CONFIG:Release>:${qwen3_LIBRARIES_TARGETS}>
                 )

    if("${qwen3_LIBS_RELEASE}" STREQUAL "")
        # If the package is not declaring any "cpp_info.libs" the package deps, system libs,
        # frameworks etc are not linked to the imported targets and we need to do it to the
        # global target
        set_property(TARGET qwen3::qwen3
                     APPEND PROPERTY INTERFACE_LINK_LIBRARIES
                     qwen3_DEPS_TARGET)
    endif()

    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_LINK_OPTIONS
                 $<$<CONFIG:Release>:${qwen3_LINKER_FLAGS_RELEASE}>)
    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_INCLUDE_DIRECTORIES
                 $<$<CONFIG:Release>:${qwen3_INCLUDE_DIRS_RELEASE}>)
    # Necessary to find LINK shared libraries in Linux
    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_LINK_DIRECTORIES
                 $<$<CONFIG:Release>:${qwen3_LIB_DIRS_RELEASE}>)
    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_COMPILE_DEFINITIONS
                 $<$<CONFIG:Release>:${qwen3_COMPILE_DEFINITIONS_RELEASE}>)
    set_property(TARGET qwen3::qwen3
                 APPEND PROPERTY INTERFACE_COMPILE_OPTIONS
                 $<$<CONFIG:Release>:${qwen3_COMPILE_OPTIONS_RELEASE}>)

########## For the modules (FindXXX)
set(qwen3_LIBRARIES_RELEASE qwen3::qwen3)
