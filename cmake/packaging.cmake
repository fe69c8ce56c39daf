# install: the program, its models and documents; component "tests": the test programs and their data.
# package: both, with the shared libraries they need, as one archive (tools/package.sh).
option(KRAIT_PACKAGE_CUBLAS "Put cuBLASLt (540 MB) into the package; without it the loader must find the toolkit's" ON)
option(KRAIT_PACKAGE_DATA "Put the models and the test data into the package" ON)

get_property(tests GLOBAL PROPERTY KRAIT_TEST_PROGRAMS)
install(TARGETS krait RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY models/ DESTINATION ${CMAKE_INSTALL_DATADIR}/krait/models)
install(FILES tools/plot_bench.py DESTINATION ${CMAKE_INSTALL_DATADIR}/krait)
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
if(tests)
  install(TARGETS ${tests} bench_ops RUNTIME DESTINATION tests/bin COMPONENT tests EXCLUDE_FROM_ALL)
  install(DIRECTORY tests/data DESTINATION tests COMPONENT tests EXCLUDE_FROM_ALL)
  install(PROGRAMS tools/run-tests.sh DESTINATION . COMPONENT tests EXCLUDE_FROM_ALL)
endif()

# DT_RPATH, not DT_RUNPATH: a library found beside the program looks for its own libraries there too.
# cuBLASLt may be left out, so the toolkit's usual place comes after.
set_target_properties(krait PROPERTIES INSTALL_RPATH "$ORIGIN/../lib:/usr/local/cuda/lib64")
set_target_properties(bench_ops ${tests} PROPERTIES INSTALL_RPATH "$ORIGIN/../../lib:/usr/local/cuda/lib64")
foreach(target IN ITEMS krait bench_ops ${tests})
  target_link_options(${target} PRIVATE -Wl,--disable-new-dtags,--as-needed)
endforeach()

if(tests)
  if(KRAIT_HAVE_CUDA)
    set(backend cuda)
  else()
    set(backend cpu)
  endif()
  add_custom_target(package
    COMMAND ${CMAKE_COMMAND} -E env KRAIT_PACKAGE_CUBLAS=$<BOOL:${KRAIT_PACKAGE_CUBLAS}>
      KRAIT_PACKAGE_DATA=$<BOOL:${KRAIT_PACKAGE_DATA}>
      ${CMAKE_CURRENT_SOURCE_DIR}/tools/package.sh ${CMAKE_CURRENT_BINARY_DIR}
      krait-${PROJECT_VERSION}-linux-x86_64-${backend}
    DEPENDS krait bench_ops ${tests} USES_TERMINAL VERBATIM)
endif()
