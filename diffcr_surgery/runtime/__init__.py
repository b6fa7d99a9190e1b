"""Stage 6, runtime: conversion in place, and the answering of calls."""
